"""What holds of every choice whatever the logits: no padding, no excess, no NaN, no order.

Also what a later token can change about an earlier one, choice by choice.
"""

import pytest
import torch
from helpers.alone import alone
from helpers.choosing import ANY_CHOICE, build, build_any, experts_of, options, pick, tokens_of
from helpers.strategies import SEEDS, routings
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_moe.config import MoEConfig
from megatron_moe.dispatch.dispatcher import DISPATCHERS
from megatron_moe.route.balance import kl, summand, switch, z_loss
from megatron_moe.route.capacity import POLICIES, Capacity, within_capacity
from megatron_moe.route.decision import Picked, Routing, count_choices
from megatron_moe.route.scores import balance_scores

EVERY_CHOICE = pytest.mark.parametrize("name", sorted(ANY_CHOICE))
# The random ones decide anew at each call; their law is in tests/unit/route/test_choices.py.
STEADY = sorted(ANY_CHOICE.keys() - {"gshard-random"})
SCORES = st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])


def drawn_logits(num_tokens, num_experts, seed, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_experts, generator=generator).to(dtype) * scale


def drawn_valid(num_tokens, seed, share):
    return torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) < share


@EVERY_CHOICE
@given(
    rows=st.integers(0, 6),
    num_experts=st.sampled_from([1, 2, 5, 8]),
    share=st.sampled_from([None, 0.0, 0.5]),
    training=st.booleans(),
    seed=SEEDS,
)
def test_a_choice_is_distinct_experts_and_never_of_padding(
    name, rows, num_experts, share, training, seed
):
    assume(num_experts > 1 or not name.startswith("gshard"))  # GShard is two experts
    choice = build_any(name, num_moe_experts=num_experts)
    logits = drawn_logits(2 * rows, num_experts, seed)
    valid = None if share is None else drawn_valid(2 * rows, seed, share)
    tokens = tokens_of(logits, valid_T=valid, num_sequences=2, training=training)
    picked = pick(choice, tokens)
    assert picked.indices_TK.shape == (2 * rows, choice.places)
    assert picked.indices_TK.dtype == torch.int64
    assert ((picked.indices_TK >= 0) & (picked.indices_TK < num_experts)).all()
    assert all(len(set(row)) == len(row) for row in picked.indices_TK.tolist())
    if valid is not None:
        assert not picked.mask()[~valid].any()
    weights = choice.weigh(logits, picked)
    assert weights.shape == picked.indices_TK.shape
    assert weights.dtype == logits.dtype
    assert (weights >= 0).all()
    sums = (weights * picked.mask()).sum(1)
    assert (sums <= choice.topk + 1e-5 if name == "sinkhorn" else sums <= 1 + 1e-5).all()


@EVERY_CHOICE
@settings(max_examples=30)
@given(
    num_experts=st.sampled_from([2, 8]),
    size=st.sampled_from([1e4, 3e3, 200.0]),
    kind=st.sampled_from(["signs", "all high", "all low", "one", "spread"]),
    score_function=SCORES,
    one=st.booleans(),
    padded=st.booleans(),
    seed=SEEDS,
)
def test_no_nan_at_large_logits(name, num_experts, size, kind, score_function, one, padded, seed):
    fields = {"num_moe_experts": num_experts}
    if name != "switch":
        fields["moe_router_score_function"] = score_function
    if one and not name.startswith("gshard"):
        fields["moe_router_topk"] = 1
    choice = build_any(name, **fields)
    logits = large_logits(12, num_experts, size, kind, seed).requires_grad_()
    valid = torch.arange(12) < 7 if padded else None
    tokens = tokens_of(logits, valid_T=valid)
    for _ in range(2):  # the second batch goes by the first one's thresholds
        picked = pick(choice, tokens)
        summary = choice.summary()
        choice.end_batch(summary)
        assert summary is None or summary.isfinite().all()
        assert all(value.isfinite().all() for value in choice.state.values())
    weights = choice.weigh(logits, picked)
    assert weights.isfinite().all()
    losses = [loss.value for loss in choice.losses(tokens, picked)]
    losses += every_balance_loss(logits, picked, fields.get("moe_router_score_function", "softmax"))
    total = (weights * torch.linspace(1, 2, weights.numel()).view_as(weights)).sum() + sum(losses)
    assert all(loss.isfinite() for loss in losses)
    total.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def large_logits(num_tokens, num_experts, size, kind, seed):
    if kind == "all high" or kind == "all low":
        logits = torch.full((num_tokens, num_experts), size if kind == "all high" else -size)
        return logits + drawn_logits(num_tokens, num_experts, seed)
    if kind == "one":
        logits = torch.full((num_tokens, num_experts), -size)
        logits[:, seed % num_experts] = size
        return logits
    signs = drawn_logits(num_tokens, num_experts, seed)
    return signs.sign() * size if kind == "signs" else signs * size


def every_balance_loss(logits, picked, score_function):
    scores = balance_scores(logits, score_function)
    counts = count_choices(picked.indices_TK, logits.shape[1], picked.chosen_TK)
    shares = counts / counts.sum().clamp(min=1)
    n = torch.tensor(float(len(logits)))
    mean = scores.detach().mean(0)
    found = [summand(loss, scores.sum(0), mean, shares, n, 1) for loss in (switch, kl)]
    return [*found, z_loss(logits, n)]


@pytest.mark.parametrize("policy", POLICIES[:2] + POLICIES[3:])
@given(case=routings(), capacity=st.integers(0, 4))
def test_capacity_is_never_exceeded_and_never_left_unused(policy, case, capacity):
    kept = within_capacity(
        case.probs_TK, case.indices_TK, case.num_experts, capacity, policy, case.kept_TK
    )
    mask = Picked(case.indices_TK, case.kept_TK).mask()
    assert not (kept & ~mask).any()
    wanted = count_choices(case.indices_TK, case.num_experts, mask)
    taken = count_choices(case.indices_TK, case.num_experts, kept)
    assert torch.equal(taken, wanted.clamp(max=capacity))


@pytest.mark.parametrize("order", ["policy", "random", "prioritised"])
@pytest.mark.parametrize("scope", ["rank", "micro_batch", "global"])
@given(case=routings(), factor=st.sampled_from([0.0, 0.4, 1.0]), minimum=st.integers(0, 3))
def test_the_limit_holds_in_every_order_and_scope(order, scope, case, factor, minimum):
    config = options(moe_expert_capacity_factor=factor)
    moe = MoEConfig(drop_order=order, capacity_scope=scope, min_capacity=minimum)
    picked = Picked(case.indices_TK, case.kept_TK)
    num_tokens, topk = case.indices_TK.shape
    kept, _ = Capacity.from_options(config, moe).limit(
        case.probs_TK, picked, case.num_experts, topk, alone(), True
    )
    taken = count_choices(case.indices_TK, case.num_experts, kept)
    share = -(-round(num_tokens * topk * factor * 5) // (case.num_experts * 5))
    assert (taken <= max(minimum, share)).all()


@given(case=routings(), capacity=st.integers(0, 4))
def test_by_position_the_first_to_come_is_served(case, capacity):
    kept = within_capacity(
        case.probs_TK, case.indices_TK, case.num_experts, capacity, "position", case.kept_TK
    )
    mask = Picked(case.indices_TK, case.kept_TK).mask()
    for expert in range(case.num_experts):
        wants = ((case.indices_TK == expert) & mask).any(1)
        has = ((case.indices_TK == expert) & kept).any(1)
        assert has[wants].tolist() == [i < capacity for i in range(int(wants.sum()))]


@given(case=routings(), seed=SEEDS)
def test_a_token_without_a_choice_gets_exactly_nothing(case, seed):
    """Infinite weights of choices that are not carried out must not show either."""
    dropped = torch.rand(len(case.indices_TK), generator=torch.Generator().manual_seed(seed)) < 0.5
    kept = Picked(case.indices_TK, case.kept_TK).mask() & ~dropped.unsqueeze(1)
    dispatcher = DISPATCHERS["alltoall"](case.num_experts, alone())
    probs = case.probs_TK.masked_fill(~kept, float("inf"))
    routing = Routing(case.indices_TK, probs, case.num_experts, kept)
    x = drawn_logits(len(case.indices_TK), 3, seed).double()
    rows, probs, plan = dispatcher.dispatch(x, routing)
    output = dispatcher.combine(rows * probs.unsqueeze(1), plan)
    assert not output[~kept.any(1)].any()
    assert output[kept.any(1)].any(1).all()


@pytest.mark.parametrize("scope", ["micro_batch", "sequence"])
@given(
    rows=st.integers(0, 8),
    num_experts=st.sampled_from([1, 2, 5, 8]),
    topk=st.integers(1, 3),
    share=st.sampled_from([None, 0.0, 0.6]),
    seed=SEEDS,
)
def test_expert_choice_is_perfectly_balanced(scope, rows, num_experts, topk, share, seed):
    topk = min(topk, num_experts)
    moe = MoEConfig(allow_future_tokens=True, expert_choice_scope=scope)
    choice = build("expert_choice", moe, num_moe_experts=num_experts, moe_router_topk=topk)
    valid = None if share is None else drawn_valid(2 * rows, seed, share)
    logits = drawn_logits(2 * rows, num_experts, seed, scale=3.0)
    picked = pick(choice, tokens_of(logits, valid_T=valid, num_sequences=2))
    members = torch.ones(2 * rows, dtype=torch.bool) if valid is None else valid
    columns = 2 if scope == "sequence" else 1
    for column in range(columns):
        mask = picked.mask()[column::columns]
        num_valid = int(members[column::columns].sum())
        expected = min(-(-num_valid * topk // num_experts), num_valid)
        assert mask.sum(0).tolist() == [expected] * num_experts


@pytest.mark.parametrize("name", ["top_p", "threshold"])
@given(
    bounds=st.tuples(st.integers(1, 8), st.integers(1, 8)).map(sorted),
    share=st.floats(0, 1),
    cut=st.sampled_from([0.0, 0.01, 0.5, 0.99]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    seed=SEEDS,
)
def test_adaptive_k_stays_between_its_bounds(name, bounds, share, cut, scale, seed):
    k_min, k_max = bounds
    target = k_min + share * (k_max - k_min)
    moe = MoEConfig(k_min=k_min, k_max=k_max, target_k=target, router_cut=cut)
    choice = build(name, moe, num_moe_experts=8)
    for step in range(3):
        logits = drawn_logits(20, 8, seed + step, scale)
        valid = torch.arange(20) < 15
        num_T = pick(choice, tokens_of(logits, valid_T=valid)).mask().sum(1)
        assert ((num_T[:15] >= k_min) & (num_T[:15] <= k_max)).all()
        assert not num_T[15:].any()
        choice.end_batch(choice.summary())


@pytest.mark.parametrize("name", STEADY)
@given(num_tokens=st.integers(0, 12), num_experts=st.sampled_from([2, 5, 8]), seed=SEEDS)
def test_shuffled_tokens_give_shuffled_choices(name, num_tokens, num_experts, seed):
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))
    logits = drawn_logits(num_tokens, num_experts, seed, dtype=torch.float64)
    found = []
    for places in (torch.arange(num_tokens), order):
        choice = build_any(name, num_moe_experts=num_experts)
        picked = pick(choice, tokens_of(logits[places], token_ids_T=places))
        found.append((experts_of(picked), choice.weigh(logits[places], picked)))
    assert found[1][0] == [found[0][0][t] for t in order.tolist()]
    torch.testing.assert_close(found[1][1], found[0][1][order], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", sorted(set(STEADY) - {"hash"}))
@given(num_tokens=st.integers(0, 12), seed=SEEDS)
def test_relabelled_experts_give_relabelled_choices(name, num_tokens, seed):
    # One token alone is balanced when all experts are equally good: then rounding decides.
    assume(num_tokens != 1 or name != "sinkhorn")
    labels = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    logits = drawn_logits(num_tokens, 6, seed, dtype=torch.float64)
    plain, moved = (
        experts_of(pick(build_any(name, num_moe_experts=6), tokens_of(x)))
        for x in (logits, logits[:, labels])
    )
    assert [{int(labels[e]) for e in experts} for experts in moved] == plain


def leaks(name, training, seed=0):
    """Whether other later tokens change what the first four tokens are given."""
    choice = build_any(name, num_moe_experts=4)
    first, found = drawn_logits(4, 4, seed), []
    pick(choice, tokens_of(drawn_logits(12, 4, seed + 1)))  # thresholds need a batch before
    choice.end_batch(choice.summary())
    for later in range(5):
        logits = torch.cat([first, drawn_logits(8, 4, seed + 2 + later, scale=3.0)])
        picked = pick(choice, tokens_of(logits, training=training))
        found.append((experts_of(picked)[:4], choice.weigh(logits, picked)[:4].tolist()))
    return any(one != found[0] for one in found)


@pytest.mark.parametrize("name", STEADY)
def test_in_evaluation_only_expert_choice_reads_the_future(name):
    assert leaks(name, training=False) == name.startswith("expert_choice")


@pytest.mark.parametrize("name", STEADY)
def test_in_training_sinkhorn_reads_the_micro_batch_too(name):
    """As in the paper: its offsets come from all tokens, later ones included."""
    assert leaks(name, training=True) == name.startswith(("expert_choice", "sinkhorn"))


@pytest.mark.parametrize("name", STEADY)
def test_a_choice_says_whether_it_reads_the_future(name):
    assert build_any(name).sees_future == (leaks(name, True) or leaks(name, False))


def test_the_first_batch_of_an_adaptive_choice_reads_itself():
    """Its cut is found there, unless the options give one."""
    found = []
    for seed in (0, 1):
        choice = build("top_p", MoEConfig(), num_moe_experts=4)
        logits = torch.cat([drawn_logits(4, 4, 0), drawn_logits(8, 4, seed, scale=5.0)])
        found.append(experts_of(pick(choice, tokens_of(logits)))[:4])
    assert found[0] != found[1]
