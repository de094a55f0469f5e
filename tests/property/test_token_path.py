"""What holds for a token's way whatever the routing: adjointness, conservation, equivariance."""

import torch
from helpers.alone import alone
from helpers.strategies import SEEDS, routings
from helpers.tolerances import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.dispatch.dispatcher import DISPATCHERS
from megatron_moe.dispatch.permute import permute, unpermute
from megatron_moe.dispatch.plan import copy_order, plan_dispatch
from megatron_moe.route.decision import Routing

KINDS = st.sampled_from(sorted(DISPATCHERS))


def _random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _routing(case, padded=False):
    counts = case.routing_map.sum(0)
    capacity = int(counts.max()) if padded and counts.numel() else None
    return Routing(case.indices_TK, case.probs_TK, case.num_experts, case.kept_TK, capacity)


@settings(max_examples=200)
@given(routings(), KINDS, st.booleans(), SEEDS)
def test_combine_is_the_adjoint_of_dispatch(case, kind, padded, seed):
    dispatcher = DISPATCHERS[kind](case.num_experts, alone())
    x_TD = _random(len(case.indices_TK), 3, seed=seed)
    x_RD, _, plan = dispatcher.dispatch(x_TD, _routing(case, padded))
    y_RD = _random(*x_RD.shape, seed=seed + 1)
    assert_same((x_RD * y_RD).sum(), (x_TD * dispatcher.combine(y_RD, plan)).sum())


@settings(max_examples=50)
@given(routings(), KINDS, st.booleans(), SEEDS)
def test_backwards_are_the_adjoints(case, kind, padded, seed):
    dispatcher = DISPATCHERS[kind](case.num_experts, alone())
    x_TD = _random(len(case.indices_TK), 3, seed=seed).requires_grad_()
    routing = _routing(case, padded)
    probs_TK = routing.probs_TK.clone().requires_grad_()
    routing = Routing(
        routing.indices_TK, probs_TK, routing.num_experts, routing.kept_TK, routing.capacity
    )
    x_RD, probs_R, plan = dispatcher.dispatch(x_TD, routing)
    y_RD = _random(*x_RD.shape, seed=seed + 1).requires_grad_()
    grad_TD = _random(*x_TD.shape, seed=seed + 2)
    weights_R = _random(*probs_R.shape, seed=seed + 3)
    loss = (dispatcher.combine(y_RD, plan) * grad_TD).sum() + (probs_R * weights_R).sum()
    grad_y, grad_probs = torch.autograd.grad(loss, (y_RD, probs_TK))
    expected_y, expected_probs, _ = dispatcher.dispatch(grad_TD, routing)
    assert_same(grad_y, expected_y, "gradient of combine")
    assert_same((grad_probs * probs_TK).sum(), (expected_probs * weights_R).sum(), "of weights")


@given(routings(), SEEDS)
def test_a_token_comes_back_once_for_each_choice(case, seed):
    x_TD = _random(len(case.indices_TK), 3, seed=seed)
    plan = plan_dispatch(_routing(case), alone())
    copies = case.routing_map.sum(1, keepdim=True)
    assert_same(unpermute(permute(x_TD, plan.order), plan.order), x_TD * copies)


@given(routings(drops=False), KINDS, SEEDS)
def test_identity_experts_with_weights_that_sum_to_one_give_back_the_input(case, kind, seed):
    dispatcher = DISPATCHERS[kind](case.num_experts, alone())
    x_TD = _random(len(case.indices_TK), 3, seed=seed)
    probs_TK = case.probs_TK / case.probs_TK.sum(1, keepdim=True)
    routing = Routing(case.indices_TK, probs_TK, case.num_experts)
    x_RD, probs_R, plan = dispatcher.dispatch(x_TD, routing)
    assert_same(dispatcher.combine(x_RD * probs_R.unsqueeze(1), plan), x_TD)


@given(routings(), SEEDS)
def test_shuffled_tokens_give_shuffled_results(case, seed):
    num_tokens = len(case.indices_TK)
    shuffle = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))
    x_TD = _random(num_tokens, 3, seed=seed)
    experts_eDD = _random(case.num_experts, 3, 3, seed=seed + 1)

    def run(order):
        kept = None if case.kept_TK is None else case.kept_TK[order]
        routing = Routing(case.indices_TK[order], case.probs_TK[order], case.num_experts, kept)
        dispatcher = DISPATCHERS["alltoall"](case.num_experts, alone())
        x_RD, probs_R, plan = dispatcher.dispatch(x_TD[order], routing)
        rows = x_RD.split(plan.tokens_per_expert.tolist())
        y_RD = torch.cat([r @ w for r, w in zip(rows, experts_eDD, strict=True)])
        return dispatcher.combine(y_RD * probs_R.unsqueeze(1), plan)

    assert_same(run(shuffle), run(torch.arange(num_tokens))[shuffle])


@given(routings(drops=False), SEEDS)
def test_both_ways_of_summing_copies_agree(case, seed):
    routing = _routing(case)
    everything = torch.ones_like(case.indices_TK, dtype=torch.bool)
    spelled_out = Routing(case.indices_TK, case.probs_TK, case.num_experts, everything)
    num_copies = case.indices_TK.numel()
    one, other = copy_order(routing, num_copies), copy_order(spelled_out, num_copies)
    assert one.copy_TK is not None and other.copy_TK is None
    y_ND = _random(num_copies, 3, seed=seed)
    assert_same(unpermute(y_ND, one), unpermute(y_ND, other))
