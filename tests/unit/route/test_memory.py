"""Decisions are taken back by the pass that computes again, and by no other."""

import pytest
import torch
from helpers.choosing import random_logits

from megatron_moe.route.decision import Picked
from megatron_moe.route.memory import Decision, DecisionMemory

NOISE = 1e-5


def decision_of(logits):
    return Decision(Picked(logits.topk(min(2, logits.shape[1]), dim=1).indices), None, None)


def nearly(logits, seed=99):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(logits.shape, generator=generator).to(logits)
    return logits * (1 + NOISE * noise) + NOISE * logits.abs().mean() * noise


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
@pytest.mark.parametrize("num_experts", [1, 2, 64])
@pytest.mark.parametrize("num_tokens", [16, 100, 1000])
def test_each_pass_takes_back_its_own(order, num_experts, num_tokens):
    memory = DecisionMemory()
    batches = [random_logits(num_tokens, num_experts, seed).float() for seed in range(4)]
    decisions = [decision_of(x) for x in batches]
    for logits, decision in zip(batches, decisions, strict=True):
        memory.keep(logits, decision)
    for i in order:
        assert memory.take(nearly(batches[i])) is decisions[i]
    assert len(memory) == 0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_of_a_tie_the_integers_come_back_though_the_logits_would_choose_otherwise(scale):
    logits = random_logits(64, 8).float()
    logits[:, :4] = 3.0  # four best experts, exactly equal
    logits *= scale
    memory, decision = DecisionMemory(), decision_of(logits)
    memory.keep(logits, decision)
    again = nearly(logits)
    assert not torch.equal(again.topk(2, dim=1).indices, decision.picked.indices_TK)
    assert memory.take(again) is decision


def test_half_precision_noise_is_no_other_micro_batch():
    batches = [random_logits(256, 16, seed).float() for seed in range(3)]
    memory = DecisionMemory()
    for logits in batches:
        memory.keep(logits, decision_of(logits))
    taken = memory.take(batches[1].bfloat16().float())
    assert torch.equal(taken.picked.indices_TK, decision_of(batches[1]).picked.indices_TK)


@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_another_micro_batch_gets_nothing(offset):
    """Also where all logits share an offset, which no difference between tokens shows."""
    memory = DecisionMemory()
    memory.keep(random_logits(64, 8, 0) + offset, None)
    assert memory.take(random_logits(64, 8, 1) + offset) is None
    assert len(memory) == 1


def test_another_number_of_tokens_gets_nothing():
    memory = DecisionMemory()
    logits = random_logits(64, 8)
    memory.keep(logits, decision_of(logits))
    assert memory.take(logits[:63]) is None


def test_nothing_kept_and_after_clearing():
    memory, logits = DecisionMemory(), random_logits(4)
    assert memory.take(logits) is None
    memory.keep(logits, decision_of(logits))
    memory.clear()
    assert memory.take(logits) is None


@pytest.mark.parametrize("num_experts", [1, 8])
def test_one_token(num_experts):
    memory = DecisionMemory()
    tokens = [random_logits(1, num_experts, seed).float() + 1 for seed in range(3)]
    decisions = [decision_of(x) for x in tokens]
    for logits, decision in zip(tokens, decisions, strict=True):
        memory.keep(logits, decision)
    for i in (1, 2, 0):
        assert memory.take(nearly(tokens[i])) is decisions[i]


def test_tokens_all_alike():
    memory = DecisionMemory()
    rows = [random_logits(1, 8, seed).float().expand(32, 8) for seed in range(2)]
    decisions = [decision_of(x) for x in rows]
    for logits, decision in zip(rows, decisions, strict=True):
        memory.keep(logits, decision)
    assert memory.take(nearly(rows[1], seed=1)) is decisions[1]
    assert memory.take(random_logits(32, 8, 7).float()) is None
    assert memory.take(rows[0]) is decisions[0]


def test_logits_that_are_all_zero():
    memory, logits = DecisionMemory(), torch.zeros(8, 4)
    memory.keep(logits, decision := decision_of(logits))
    assert memory.take(torch.zeros(8, 4)) is decision


def test_no_tokens():
    memory, logits = DecisionMemory(), torch.zeros(0, 4)
    memory.keep(logits, decision := decision_of(logits))
    assert memory.take(torch.zeros(0, 4)) is decision


def test_of_equal_micro_batches_each_is_taken_once():
    memory, logits = DecisionMemory(), random_logits(8)
    kept = [decision_of(logits) for _ in range(2)]
    for decision in kept:
        memory.keep(logits, decision)
    assert [memory.take(logits) is not None for _ in range(3)] == [True, True, False]


def test_logits_too_large_to_compare_take_back_what_there_is():
    logits = random_logits(8).float()
    logits[3, 2] = float("inf")
    memory = DecisionMemory()
    memory.keep(logits, decision := decision_of(logits))
    assert memory.take(logits) is decision


def test_what_is_kept_does_not_change_with_the_logits():
    logits = random_logits(8)
    memory = DecisionMemory()
    memory.keep(logits, decision := decision_of(logits))
    before = logits.clone()
    logits.zero_()
    assert memory.take(before) is decision


def test_a_sample_is_small():
    memory = DecisionMemory()
    for num_tokens in (63, 64, 65, 127, 128, 1000):
        memory.keep(random_logits(num_tokens), None)
        assert len(memory._entries[-1][0]) <= 64
