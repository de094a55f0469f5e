"""Adaptive k: the rule, its bounds, what holds its mean: the cut by itself, the loss by itself."""

import math
import re

import pytest
import torch
from helpers import reference_choices as reference
from helpers.choosing import (
    build,
    experts_of,
    options,
    pick,
    random_logits,
    tokens_of,
    weights_of,
)
from helpers.strategies import SEEDS
from helpers.tolerances import assert_same
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config import MoEConfig
from megatron_moe.route.choice import choice_named
from megatron_moe.route.choices.adaptive import share_below
from megatron_moe.route.part import end_global_batch

KINDS = pytest.mark.parametrize("name", ["top_p", "threshold"])
RULES = {"top_p": reference.top_p, "threshold": reference.threshold}


def adaptive(name, num_experts=8, **moe):
    return build(name, MoEConfig(**moe), num_moe_experts=num_experts)


def mean_k(picked):
    return picked.mask().sum().item() / len(picked.indices_TK)


@KINDS
@given(num_tokens=st.integers(0, 7), cut=st.sampled_from([0.05, 0.2, 0.45, 0.8, 0.99]), seed=SEEDS)
def test_choices_and_weights_equal_the_loop(name, num_tokens, cut, seed):
    logits = random_logits(num_tokens, 8, seed)
    choice = adaptive(name, k_min=2, k_max=5, target_k=3, router_cut=cut)
    picked = pick(choice, tokens_of(logits))
    chosen = RULES[name](logits, cut, 2, 5)
    assert experts_of(picked) == [set(experts) for experts in chosen]
    scores = reference.balance_scores(logits)
    for t, weights in enumerate(weights_of(choice, logits, picked)):
        assert weights == pytest.approx({e: scores[t][e] for e in chosen[t]}, rel=1e-10)


@KINDS
@pytest.mark.parametrize("training", [False, True])
def test_evaluation_uses_the_cut_and_leaves_it(name, training):
    choice = adaptive(name, router_cut=0.3)
    before = choice.state["choice_cut"].clone()
    pick(choice, tokens_of(random_logits(50, 8), training=training))
    end_global_batch([choice], choice.groups.tp_dp_cp)
    assert torch.equal(choice.state["choice_cut"], before) == (not training)


@KINDS
def test_the_first_batch_meets_the_target_already(name):
    choice = adaptive(name, target_k=2.5)
    picked = pick(choice, tokens_of(random_logits(400, 8).float()))
    assert mean_k(picked) == pytest.approx(2.5, rel=0.005)


@KINDS
@pytest.mark.parametrize("num_experts", [16, 256])
@pytest.mark.parametrize("spread", [0.01, 0.3, 3.0, 10.0, 20.0])
def test_the_target_is_met_by_any_router_from_flat_to_sharp(name, num_experts, spread):
    choice = adaptive(name, num_experts, target_k=3.0, k_max=8)
    logits = random_logits(2000, num_experts).float() * spread
    pick(choice, tokens_of(logits))
    end_global_batch([choice], choice.groups.tp_dp_cp)
    assert mean_k(pick(choice, tokens_of(logits))) == pytest.approx(3.0, rel=0.02)


@KINDS
def test_padding_does_not_pull_the_cut(name):
    logits = random_logits(400, 8)
    logits[200:] = 0.0
    valid = torch.arange(400) < 200
    choice, alone = adaptive(name), adaptive(name)
    pick(choice, tokens_of(logits, valid_T=valid))
    pick(alone, tokens_of(logits[:200]))
    assert_same(choice.state["choice_cut"], alone.state["choice_cut"])


@KINDS
def test_a_fixed_cut_stays(name):
    choice = adaptive(name, target_k=-1, router_cut=0.2)
    before = choice.state["choice_cut"].clone()
    picked = pick(choice, tokens := tokens_of(random_logits(50, 8)))
    assert choice.losses(tokens, picked) == []
    end_global_batch([choice], choice.groups.tp_dp_cp)
    assert torch.equal(choice.state["choice_cut"], before)


@KINDS
def test_no_tokens_leave_the_cut_unknown(name):
    choice = adaptive(name)
    picked = pick(choice, tokens := tokens_of(random_logits(0, 8)))
    assert picked.indices_TK.shape == (0, 4)
    assert choice.losses(tokens, picked) == []
    end_global_batch([choice], choice.groups.tp_dp_cp)
    assert choice.state["choice_cut"].isnan()
    assert mean_k(pick(choice, tokens_of(random_logits(400, 8)))) == pytest.approx(2, rel=0.005)


@KINDS
@pytest.mark.parametrize("target", [1.5, 3.0])
def test_the_mean_stays_within_two_percent_while_the_router_drifts(name, target):
    """Logits of a router whose weights wander and grow: the cut of a batch serves the next one."""
    generator = torch.Generator().manual_seed(3)
    choice = adaptive(name, target_k=target)
    weight = torch.randn(8, 16, generator=generator) * 0.1
    found = []
    for _ in range(40):
        for _ in range(2):  # micro-batches
            x = torch.randn(1024, 16, generator=generator)
            found.append(mean_k(pick(choice, tokens_of(x @ weight.T))))
        end_global_batch([choice], choice.groups.tp_dp_cp)
        weight = weight * 1.02 + torch.randn(8, 16, generator=generator) * 0.005
    after = torch.tensor(found[4:])
    assert after.mean().item() == pytest.approx(target, rel=0.02)
    # A batch alone has the spread of its 1,024 tokens, and the drift of one step.
    assert ((after - target).abs() < 0.1 * target).all()


@KINDS
@pytest.mark.parametrize("start", [0.5, 3.0])
def test_the_loss_alone_pulls_the_mean_to_the_target(name, start):
    """Nobody ends a batch, so the cut stays where the options put it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(512, 16, generator=generator)
    weight = (torch.randn(8, 16, generator=generator) * 0.25 * start).requires_grad_()
    cut = {"top_p": 0.6, "threshold": 0.12}[name]
    choice = adaptive(name, target_k=2.5, router_cut=cut, budget_loss_coeff=1.0)
    optimizer = torch.optim.Adam([weight], lr=0.01)
    found = []
    for _ in range(150):
        tokens = tokens_of(x @ weight.T)
        picked = pick(choice, tokens)
        found.append(mean_k(picked))
        (loss,) = choice.losses(tokens, picked)
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    assert abs(found[0] - 2.5) > 0.25
    assert sum(found[-20:]) / 20 == pytest.approx(2.5, rel=0.02)
    assert choice.state["choice_cut"].item() == pytest.approx(choice.cut_of(cut))


@KINDS
@pytest.mark.parametrize("padded", [False, True])
def test_value_and_gradient_of_the_budget_loss(name, padded):
    """The value is that of the hard count, the gradient the finite difference of the soft one."""
    logits = random_logits(6, 8).requires_grad_()
    valid = torch.arange(6) < 4 if padded else torch.ones(6, dtype=torch.bool)
    moe = {"target_k": 3.0, "router_cut": 0.3, "budget_loss_coeff": 0.5}
    choice = adaptive(name, **moe)
    tokens = tokens_of(logits, valid_T=valid if padded else None)
    picked = pick(choice, tokens)
    (loss,) = choice.losses(tokens, picked)
    kept = [sorted(experts) for experts in experts_of(picked) if experts]
    assert (loss.name, loss.coeff) == ("router_budget_loss", 0.5)
    assert loss.value.item() == pytest.approx(reference.budget_loss(kept, 3.0))
    mean = sum(map(len, kept)) / len(kept)
    slope = 2 * (mean / 3.0 - 1) / 3.0 / len(kept)
    loss.value.backward()
    step = 1e-6
    for t in range(6):
        for e in range(8):
            bump = torch.zeros_like(logits)
            bump[t, e] = step
            up, down = (_soft_count(choice, logits + sign * bump, valid) for sign in (1, -1))
            expected = slope * (up - down) / (2 * step)
            assert logits.grad[t, e].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)


def _soft_count(choice, logits, valid):
    """Σ sigmoid((cut - v) / softness) over the places that a cut decides about."""
    cut, total = choice.state["choice_cut"].item(), 0.0
    for t, row in enumerate(logits.detach().softmax(-1).tolist()):
        places = sorted(row, reverse=True)[: choice.k_max]
        for j in range(choice.k_min if valid[t] else choice.k_max, choice.k_max):
            if type(choice).__name__ == "TopP":
                before = sum(places[:j])
                value = math.log(before / (1 - before))
            else:
                value = -math.log(places[j])
            total += 1 / (1 + math.exp((value - cut) / 0.5))
    return total


def test_the_cut_is_the_quantile():
    counts = torch.zeros(2**15 + 1, dtype=torch.float64)
    counts[1024] = counts[4096] = 10
    counts[-1] = 10
    assert share_below(counts, 1.0) * 2**15 == 4096
    assert share_below(counts, 1.5) * 2**15 == 4096.5
    assert share_below(counts, 0.25) * 2**15 == 1024.25
    assert share_below(counts, 0.0) * 2**15 == 1024
    assert share_below(counts, 2.0) > 1.0


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"k_min": 0}, r"k_min \(0\) and k_max \(4\) must satisfy 1 ≤ k_min ≤ k_max ≤ .*\(8\)"),
        ({"k_min": 5}, r"k_min \(5\) and k_max \(4\) must satisfy"),
        ({"k_max": 9}, r"k_max \(9\) must satisfy"),
        ({"target_k": 4.5}, r"target_k \(4.5\) must lie between k_min \(1\) and k_max \(4\)"),
        ({"k_min": 3}, r"target_k \(2\) must lie between k_min \(3\) and k_max \(4\)"),
        ({"target_k": -1}, r"router_cut \(0.0\) must lie between 0 and 1 when a negative target_k"),
        ({"router_cut": 1.5}, r"router_cut \(1.5\) must lie between 0 and 1"),
        ({"router_cut": -0.1}, r"router_cut \(-0.1\) must lie between 0 and 1"),
    ],
)
@KINDS
def test_wrong_options(name, moe, message):
    faults = choice_named(name).faults(options(num_moe_experts=8), MoEConfig(**moe))
    assert len(faults) == 1
    assert re.search(message, faults[0])
