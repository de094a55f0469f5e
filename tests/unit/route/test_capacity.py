"""Capacity against the loop, and its own promises."""

import pytest
import torch
from helpers.reference_moe import ReferenceRouter, keep_within_capacity
from helpers.strategies import routings
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.route.capacity import capacity_of, place_in_expert, within_capacity


@pytest.mark.parametrize("policy", ["probs", "position"])
@given(case=routings(), factor=st.sampled_from([0.0, 0.3, 0.5, 1.0, 2.0]))
def test_kept_choices_equal_the_loop(policy, case, factor):
    num_tokens, topk = case.indices_TK.shape
    capacity = capacity_of(num_tokens, topk, case.num_experts, factor)
    kept = within_capacity(
        case.probs_TK, case.indices_TK, case.num_experts, capacity, policy, case.kept_TK
    )
    shape = (num_tokens, case.num_experts)
    probs_TE = case.probs_TK.new_zeros(shape).scatter(1, case.indices_TK, case.probs_TK)
    options = ReferenceRouter(topk=topk, capacity_factor=factor, drop_policy=policy)
    expected = keep_within_capacity(probs_TE, case.routing_map, options)
    assert torch.equal(expected.gather(1, case.indices_TK), kept)


def test_first_come_first_served():
    indices = torch.zeros(5, 1, dtype=torch.int64)
    probs = torch.tensor([[0.1], [0.9], [0.2], [0.8], [0.3]])
    kept = within_capacity(probs, indices, 2, 2, "position")
    assert kept.flatten().tolist() == [True, True, False, False, False]
    kept = within_capacity(probs, indices, 2, 2, "probs")
    assert kept.flatten().tolist() == [False, True, False, True, False]


def test_padding_takes_no_room():
    indices = torch.zeros(4, 1, dtype=torch.int64)
    valid = torch.tensor([[False], [False], [True], [True]])
    kept = within_capacity(torch.ones(4, 1), indices, 2, 2, "position", valid)
    assert torch.equal(kept, valid)


def test_places_count_up_in_each_expert():
    assert place_in_expert(torch.tensor([0, 0, 2, 2, 2, 3]), 3).tolist() == [0, 1, 0, 1, 2, 0]


def test_unknown_policy():
    with pytest.raises(ValueError, match=r"drop policy \(fair\) must be one of probs, position"):
        within_capacity(torch.ones(1, 1), torch.zeros(1, 1).long(), 1, 1, "fair")
