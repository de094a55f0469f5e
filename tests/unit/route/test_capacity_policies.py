"""Every drop policy against its loop, with ties; the limit in training and in evaluation."""

import pytest
import torch
from helpers import reference_choices as reference
from helpers.alone import alone
from helpers.choosing import options
from helpers.strategies import SEEDS, routings
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config import MoEConfig
from megatron_moe.route.capacity import Capacity, capacity_of, within_capacity
from megatron_moe.route.decision import Picked, count_choices


@pytest.mark.parametrize("policy", ["probs", "position", "prioritised"])
@given(case=routings(), capacity=st.integers(0, 5), ties=st.booleans())
def test_kept_choices_equal_the_loop(policy, case, capacity, ties):
    probs = (case.probs_TK * 3).round() if ties else case.probs_TK
    chosen = case.kept_TK
    kept = within_capacity(probs, case.indices_TK, case.num_experts, capacity, policy, chosen)
    mask = Picked(case.indices_TK, chosen).mask()
    expected = reference.within_capacity(
        case.indices_TK.tolist(), probs.tolist(), mask.tolist(), capacity, policy
    )
    assert kept.tolist() == expected


def test_prioritised_serves_first_choices_first():
    indices = torch.tensor([[0, 1], [1, 0], [0, 1]])
    probs = torch.tensor([[0.5, 0.4], [0.9, 0.8], [0.7, 0.3]])
    kept = within_capacity(probs, indices, 2, 1, "prioritised")
    # Of expert 0 token 2 is the heavier first choice; 0.8 is heavier still, but second.
    assert kept.tolist() == [[False, False], [True, False], [True, False]]


@pytest.mark.parametrize(
    ("tokens", "topk", "experts", "factor", "minimum", "rows"),
    [(10, 2, 4, 1.0, 0, 5), (10, 2, 4, 1.25, 0, 7), (10, 2, 8, 1.0, 4, 4), (0, 2, 4, 1.0, 0, 0)],
)
def test_rows(tokens, topk, experts, factor, minimum, rows):
    assert capacity_of(tokens, topk, experts, factor, minimum) == rows


def limit(moe, training=True, **fields):
    """Kept choices of eight tokens that all want expert 0 first and expert 1 second."""
    capacity = Capacity.from_options(options(**fields), MoEConfig(**moe))
    indices = torch.tensor([[0, 1]]).expand(8, 2)
    probs = torch.linspace(0.9, 0.6, 8).unsqueeze(1) * torch.tensor([1.0, 0.5])
    return capacity.limit(probs, Picked(indices), 4, 2, alone(), training)


@pytest.mark.parametrize(
    ("moe", "training", "taken"),
    [
        ({}, True, 2),
        ({}, False, 2),
        ({"eval_capacity_factor": 1.5}, True, 2),
        ({"eval_capacity_factor": 1.5}, False, 6),
        ({"min_capacity": 3}, True, 3),
        ({"min_capacity": 100}, True, 8),
    ],
)
def test_factor_and_minimum(moe, training, taken):
    kept, rows = limit(moe, training, moe_expert_capacity_factor=0.5)
    assert kept.sum(0).tolist() == [taken, taken]
    assert rows is None


def test_without_a_factor_nothing_is_dropped():
    assert limit({}) == (None, None)


def test_padding_to_capacity_says_the_rows():
    fields = {"moe_expert_capacity_factor": 0.5, "moe_pad_expert_input_to_capacity": True}
    assert limit({}, **fields)[1] == 2
    assert limit({"min_capacity": 9}, **fields)[1] == 9


@given(seed=SEEDS)
def test_random_fills_the_capacity_with_anybody(seed):
    torch.manual_seed(seed)
    kept, _ = limit({"drop_order": "random"}, moe_expert_capacity_factor=0.5)
    assert kept.sum(0).tolist() == [2, 2]


def test_random_favours_nobody():
    torch.manual_seed(0)
    fields = {"moe_expert_capacity_factor": 0.5}
    kept = sum(limit({"drop_order": "random"}, **fields)[0].double() for _ in range(400))
    # Each of 8 with probability 1/4: 100 of 400; five standard deviations are 43.
    assert ((kept - 100).abs() < 43).all()


@pytest.mark.parametrize(
    ("option", "padded", "scope"),
    [
        ("auto", False, "micro_batch"),
        ("auto", True, "rank"),
        ("rank", False, "rank"),
        ("global", False, "global"),
    ],
)
def test_scopes(option, padded, scope):
    config = options(moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=padded)
    assert Capacity.from_options(config, MoEConfig(capacity_scope=option)).scope == scope


def test_places_without_a_choice_take_no_room():
    indices = torch.tensor([[0, 1, 2]]).expand(6, 3)
    chosen = torch.tensor([[True, False, True]]).expand(6, 3)
    kept = within_capacity(torch.ones(6, 3), indices, 4, 4, "position", chosen)
    assert count_choices(indices, 4, kept).tolist() == [4, 0, 4, 0]
