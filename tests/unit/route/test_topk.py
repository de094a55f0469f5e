import pytest
import torch

from megatron_moe.route.topk import best_experts


@pytest.mark.parametrize(
    ("num_experts", "topk"), [(1, 1), (8, 2), (5, 5), (64, 8), (256, 8), (300, 7), (512, 2)]
)
@pytest.mark.parametrize("num_tokens", [0, 1, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_as_torch_where_values_differ(num_experts, topk, num_tokens, dtype):
    values = torch.randn(num_tokens, num_experts, dtype=dtype)
    found = best_experts(values, topk)
    assert found.dtype == torch.int64
    assert torch.equal(found, values.topk(topk, dim=1).indices)


def test_order_of_special_values():
    inf, tiny = float("inf"), 1e-40
    values = torch.tensor([[-inf, -tiny, 0.0, tiny, inf, -3.0, 3.0]])
    assert best_experts(values, 7).tolist() == [[4, 6, 3, 2, 1, 5, 0]]


def test_not_a_number_still_gives_distinct_experts():
    values = torch.full((3, 8), float("nan"))
    assert best_experts(values, 4).sort(dim=1).values.unique(dim=1).shape == (3, 4)


def test_on_a_tie_the_earlier_expert_wins():
    assert best_experts(torch.zeros(2, 6), 3).tolist() == [[0, 1, 2]] * 2


def test_rows_of_a_transposed_matrix():
    values = torch.randn(9, 40).t()
    assert torch.equal(best_experts(values, 3), values.topk(3, dim=1).indices)
