"""Each choice against its loop; its weights; that the router learns by it; choices from outside."""

import pytest
import torch
from helpers import reference_choices as reference
from helpers.choosing import (
    ANY_CHOICE,
    build,
    build_any,
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
from megatron_moe.route import choice as choice_module
from megatron_moe.route.choice import Choice, choice_named, choice_names, name_of_choice, register
from megatron_moe.route.choices.hashing import mix
from megatron_moe.route.choices.sinkhorn import balancing_offsets
from megatron_moe.route.decision import Picked

SIZES = st.integers(0, 7)


def sets(chosen):
    return [set(experts) for experts in chosen]


def assert_same_weights(found, expected):
    assert [w.keys() for w in found] == [w.keys() for w in expected]
    for token, weights in enumerate(expected):
        for expert, weight in weights.items():
            assert found[token][expert] == pytest.approx(weight, rel=1e-10)


@given(SIZES, SEEDS)
def test_switch(num_tokens, seed):
    logits, choice = random_logits(num_tokens, 5, seed), build("switch", moe_router_topk=1)
    picked = pick(choice, tokens_of(logits))
    chosen, weights = reference.switch(logits)
    assert experts_of(picked) == sets(chosen)
    assert_same_weights(weights_of(choice, logits, picked), weights)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
@given(num_tokens=SIZES, seed=SEEDS)
def test_gshard(score_function, num_tokens, seed):
    logits = random_logits(num_tokens, 5, seed)
    choice = build("gshard", moe_router_score_function=score_function)
    picked = pick(choice, tokens_of(logits))
    chosen, weights = reference.gshard(logits, score_function)
    assert experts_of(picked) == sets(chosen)
    assert_same_weights(weights_of(choice, logits, picked), weights)


@pytest.mark.parametrize("factor", [None, 2.5])
def test_the_random_second_expert_comes_with_twice_its_weight_as_probability(factor):
    choice = build(
        "gshard", MoEConfig(second_expert="random"), moe_router_topk_scaling_factor=factor
    )
    logits = torch.tensor([[2.0, 0.2, -9.0, -9.0]]).expand(20_000, 4)
    torch.manual_seed(1)
    picked = pick(choice, tokens_of(logits))
    weight = torch.softmax(torch.tensor([2.0, 0.2]), 0)[1]
    assert picked.mask()[:, 0].all()
    # Five standard deviations of 20,000 draws are below 0.018.
    assert picked.mask()[:, 1].double().mean().item() == pytest.approx(2 * weight.item(), abs=0.018)
    always = pick(choice, tokens_of(logits, training=False))
    assert always.mask().all()


@pytest.mark.parametrize("columns", [None, 2], ids=["micro_batch", "sequence"])
@given(rows=st.integers(0, 5), padding=st.booleans(), topk=st.integers(1, 4), seed=SEEDS)
def test_expert_choice(columns, rows, padding, topk, seed):
    logits = random_logits(2 * rows, 4, seed)
    valid = torch.rand(2 * rows, generator=torch.Generator().manual_seed(seed)) < 0.6
    scope = "sequence" if columns else "micro_batch"
    moe = MoEConfig(allow_future_tokens=True, expert_choice_scope=scope)
    choice = build("expert_choice", moe, moe_router_topk=topk)
    tokens = tokens_of(logits, valid_T=valid if padding else None, num_sequences=2)
    picked = pick(choice, tokens)
    used = valid.tolist() if padding else [True] * len(logits)
    chosen = reference.expert_choice(logits, topk, used, columns)
    assert experts_of(picked) == sets(chosen)
    scores = reference.balance_scores(logits)
    weights = [{e: scores[t][e] for e in experts} for t, experts in enumerate(chosen)]
    assert_same_weights(weights_of(choice, logits, picked), weights)


def test_on_a_tie_an_expert_takes_the_earlier_token():
    choice = build("expert_choice", MoEConfig(allow_future_tokens=True), moe_router_topk=1)
    picked = pick(choice, tokens_of(torch.zeros(8, 4)))
    assert experts_of(picked) == [{0, 1, 2, 3}] * 2 + [set()] * 6


@pytest.mark.parametrize("padding", [False, True])
@given(num_tokens=st.sampled_from([0, 3, 6, 9]), topk=st.integers(1, 3), seed=SEEDS)
def test_sinkhorn(padding, num_tokens, topk, seed):
    logits = random_logits(num_tokens, 4, seed)
    valid = torch.arange(num_tokens) % 3 != 1
    choice = build("sinkhorn", MoEConfig(sinkhorn_iterations=7), moe_router_topk=topk)
    picked = choice.pick(tokens_of(logits, valid_T=valid if padding else None))
    used = valid.tolist() if padding else [True] * num_tokens
    assert experts_of(picked) == sets(reference.sinkhorn(logits, topk, 7, used))
    scores = torch.sigmoid(logits) if topk == 1 else torch.softmax(logits, -1)
    assert_same(choice.weigh(logits, picked), scores.gather(1, picked.indices_TK))


def test_sinkhorn_offsets_balance_the_soft_loads():
    logits = random_logits(64, 4) + torch.tensor([3.0, 0.0, 0.0, -2.0])
    loads = torch.softmax(logits + balancing_offsets(logits, 100), -1).sum(0)
    torch.testing.assert_close(loads, torch.full((4,), 16.0, dtype=torch.float64))


def test_sinkhorn_in_evaluation_looks_at_each_token_alone():
    logits = random_logits(9) + torch.tensor([5.0, 0.0, 0.0, 0.0])
    picked = pick(build("sinkhorn"), tokens_of(logits, training=False))
    assert torch.equal(picked.indices_TK, logits.topk(2, dim=1).indices)


@given(num_tokens=SIZES, topk=st.integers(1, 4), seed=SEEDS)
def test_hash(num_tokens, topk, seed):
    ids = torch.randint(0, 2**17, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    choice = build("hash", num_moe_experts=6, moe_router_topk=topk)
    logits = random_logits(num_tokens, 6, seed)
    picked = pick(choice, tokens_of(logits, token_ids_T=ids))
    assert experts_of(picked) == reference.hashed(ids.tolist(), 6, topk)
    weights = choice.weigh(logits, picked)
    assert_same(weights, torch.full_like(weights, 1 / topk))


def test_hash_mixes_as_splitmix64_does():
    values = [0, 1, 2, 12345, 2**62 + 7, -5]
    found = mix(torch.tensor(values)).tolist()
    assert [x % 2**64 for x in found] == [reference._mix(x % 2**64) for x in values]


def test_hash_spreads_a_vocabulary_evenly():
    ids = torch.arange(32_000)
    picked = pick(
        build("hash", num_moe_experts=8), tokens_of(torch.zeros(32_000, 8), token_ids_T=ids)
    )
    load = torch.bincount(picked.indices_TK.flatten(), minlength=8).double()
    # 8,000 each; five standard deviations of a fair draw are 390.
    assert (load - 8000).abs().max() < 390


LEARNING = [name for name in ANY_CHOICE if name != "hash"]


@pytest.mark.parametrize(
    ("name", "score_function"),
    [("switch", "softmax")]  # Switch is softmax by definition
    + [(n, s) for n in LEARNING if n != "switch" for s in ("softmax", "sigmoid", "sqrtsoftplus")],
)
def test_the_router_learns_by_the_weights(name, score_function):
    choice = build_any(name, moe_router_score_function=score_function)
    assert_learns(choice)


@pytest.mark.parametrize("name", ["switch", "sinkhorn", "top_p", "threshold", "expert_choice"])
def test_the_router_learns_with_one_choice_a_token(name):
    one = MoEConfig(k_max=1, target_k=1, allow_future_tokens=True)
    assert_learns(build(name, one, moe_router_topk=1))


def assert_learns(choice):
    logits = random_logits(12).requires_grad_()
    picked = pick(choice, tokens_of(logits))
    weights = choice.weigh(logits, picked)
    cotangent = torch.linspace(1, 2, weights.numel(), dtype=torch.float64).view_as(weights)
    (weights * cotangent * picked.mask()).sum().backward()
    moved = logits.grad.abs().sum(1)
    assert moved.isfinite().all()
    assert moved[picked.mask().any(1)].min() > 1e-6


class Backwards(Choice):
    """The last experts, whatever the logits say."""

    def pick(self, tokens):
        last = torch.arange(self.num_experts - self.topk, self.num_experts)
        return Picked(last.expand(tokens.logits_TE.shape[0], -1))


def test_a_choice_from_outside_by_its_path():
    assert choice_named(f"{__name__}:Backwards") is Backwards
    choice = build(f"{__name__}:Backwards")
    logits = random_logits(3)
    picked = pick(choice, tokens_of(logits))
    assert experts_of(picked) == [{2, 3}] * 3
    assert_same(choice.weigh(logits, picked), logits[:, 2:].softmax(-1))


def test_a_choice_from_outside_by_a_name_of_its_own(monkeypatch):
    monkeypatch.setattr(choice_module, "_CHOICES", dict(choice_module._CHOICES))
    assert register("backwards")(Backwards) is Backwards
    assert choice_named("backwards") is Backwards
    assert "backwards" in choice_names()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best", r"router_choice \(best\) must be one of .*expert_choice, gshard, hash"),
        ("no_such_package:Class", r"cannot be imported: No module named 'no_such_package'"),
        (f"{__name__}:Missing", r"cannot be imported: .*has no attribute 'Missing'"),
        (f"{__name__}:assert_learns", r"is not a subclass of megatron_moe's Choice"),
    ],
)
def test_a_choice_that_is_none(name, message):
    with pytest.raises(ValueError, match=message):
        choice_named(name)


def test_megatrons_flag_names_two_choices():
    kinds = ["sinkhorn", "quantile_balancing", "aux_loss"]
    found = [name_of_choice(options(moe_router_load_balancing_type=k), MoEConfig()) for k in kinds]
    assert found == ["sinkhorn", "quantile", "topk"]
    with pytest.raises(ValueError, match=r"\(sinkhorn\) chooses the experts by itself: give it"):
        name_of_choice(
            options(moe_router_load_balancing_type="sinkhorn"), MoEConfig(router_choice="switch")
        )
    with pytest.raises(ValueError, match=r"\(sinkhorn aux_loss\) chooses the experts by itself"):
        name_of_choice(
            options(moe_router_load_balancing_type=["sinkhorn", "aux_loss"]), MoEConfig()
        )
