"""Quantile balancing: thresholds against the loop, averaging, blending, even loads."""

import pytest
import torch
from helpers import reference_choices as reference
from helpers.choosing import build, pick, random_logits, tokens_of
from helpers.strategies import SEEDS
from helpers.tolerances import assert_same
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.route.choices.quantile import thresholds
from megatron_moe.route.part import end_global_batch


@given(num_tokens=st.integers(1, 9), topk=st.integers(1, 4), seed=SEEDS)
def test_thresholds_equal_the_loop(num_tokens, topk, seed):
    logits = random_logits(num_tokens, 5, seed)
    beta = random_logits(1, 5, seed + 1)[0]
    expected = reference.quantile_thresholds(logits, topk, beta.tolist())
    assert_same(thresholds(logits, topk, beta), torch.tensor(expected, dtype=torch.float64))


def test_an_expert_passes_its_share_of_tokens_by_its_threshold():
    logits, beta = random_logits(40, 5), torch.zeros(5, dtype=torch.float64)
    losers = logits.sort(dim=1, descending=True).values[:, 2:3]
    values, limits = logits - losers, thresholds(logits, 2, beta)
    share = 16  # 40 · 2 / 5; where the expert is itself the first loser, values tie at 0
    assert ((values > limits).sum(0) <= share).all()
    assert ((values >= limits).sum(0) > share).all()


def end_batch(choice):
    end_global_batch([choice], choice.groups.tp_dp_cp)


@pytest.mark.parametrize("ema", [0.0, 0.75])
def test_beta_is_the_blended_centred_mean_of_the_micro_batches(ema):
    choice = build("quantile", moe_router_quantile_balancing_ema=ema)
    choice.state["qb_beta"] += torch.tensor([0.3, -0.1, 0.0, -0.2])
    before = choice.state["qb_beta"].clone()
    batches = [random_logits(8, 4, seed) for seed in range(3)]
    for logits in batches:
        picked = pick(choice, tokens_of(logits))
        assert torch.equal(picked.indices_TK, (logits - before).topk(2, dim=1).indices)
    end_batch(choice)
    found = [reference.quantile_thresholds(x, 2, before.tolist()) for x in batches]
    mixed = ema * before + (1 - ema) * torch.tensor(found, dtype=torch.float64).mean(0).float()
    assert_same(choice.state["qb_beta"], mixed - mixed.mean())


def test_padding_and_evaluation_count_for_nothing():
    logits, valid = random_logits(12), torch.arange(12) < 7
    padded, short, idle = build("quantile"), build("quantile"), build("quantile")
    pick(padded, tokens_of(logits, valid_T=valid))
    pick(short, tokens_of(logits[:7]))
    pick(idle, tokens_of(logits, training=False))
    pick(idle, tokens_of(logits, valid_T=torch.zeros(12, dtype=torch.bool)))
    for choice in (padded, short, idle):
        end_batch(choice)
    assert torch.equal(padded.state["qb_beta"], short.state["qb_beta"])
    assert not idle.state["qb_beta"].any()


def test_a_batch_counts_once():
    choice = build("quantile")
    pick(choice, tokens_of(random_logits(12)))
    end_batch(choice)
    before = choice.state["qb_beta"].clone()
    end_batch(choice)
    assert torch.equal(choice.state["qb_beta"], before)


def test_loads_become_even():
    choice = build("quantile", num_moe_experts=8)
    lopsided = torch.linspace(-2, 2, 8, dtype=torch.float64)
    loads = []
    for seed in range(12):
        picked = pick(choice, tokens_of(random_logits(512, 8, seed) + lopsided))
        loads.append(torch.bincount(picked.indices_TK.flatten(), minlength=8).double())
        end_batch(choice)
    uneven = [float(load.std() / load.mean()) for load in loads]
    assert uneven[0] > 0.9
    assert max(uneven[6:]) < 0.15
