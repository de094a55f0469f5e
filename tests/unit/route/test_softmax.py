import pytest
import torch

from megatron_moe.route.softmax import score_sums, softmax


@pytest.mark.parametrize("num_experts", [1, 2, 8, 15, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_is_torchs(num_experts, dtype):
    x = (torch.randn(50, num_experts, dtype=dtype) * 5).requires_grad_()
    grad = torch.randn(50, num_experts, dtype=dtype)
    found, expected = softmax(x), torch.softmax(x, dim=-1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, x, grad), torch.autograd.grad(expected, x, grad)
    )


@pytest.mark.parametrize("num_experts", [1, 4, 40])
@pytest.mark.parametrize("num_sequences", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_sums_and_denominators_with_their_gradients(num_experts, num_sequences, padded):
    logits = (torch.randn(12, num_experts, dtype=torch.float64) * 3).requires_grad_()
    valid = torch.rand(12) < 0.7 if padded else None
    sums, logsumexp = score_sums(logits, valid, num_sequences)
    scores = torch.softmax(logits, dim=-1).detach()
    kept = scores if valid is None else scores * valid.unsqueeze(1)
    expected = torch.stack([kept[b::num_sequences].sum(0) for b in range(num_sequences)])
    torch.testing.assert_close(sums, expected)
    torch.testing.assert_close(logsumexp, logits.logsumexp(-1))
    assert torch.autograd.gradcheck(lambda x: score_sums(x, valid, num_sequences), logits)


def test_only_one_of_both_is_used():
    logits = torch.randn(12, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: score_sums(x)[0], logits)
    assert torch.autograd.gradcheck(lambda x: score_sums(x)[1], logits)


def test_large_logits_and_no_tokens():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]]).requires_grad_()
    sums, logsumexp = score_sums(logits)
    (sums[0, 1] + logsumexp.square().mean()).backward()
    torch.testing.assert_close(logsumexp, logits.logsumexp(-1))
    assert logits.grad.isfinite().all()
    sums, logsumexp = score_sums(torch.zeros(0, 8))
    assert sums.tolist() == [[0.0] * 8] and logsumexp.shape == (0,)
