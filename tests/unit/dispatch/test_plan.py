import torch
from helpers.alone import alone
from helpers.strategies import routings
from hypothesis import given

from megatron_moe.dispatch.plan import copy_order, plan_dispatch, plan_gathered
from megatron_moe.route.decision import Routing


def _routing(case, capacity=None):
    return Routing(case.indices_TK, case.probs_TK, case.num_experts, case.kept_TK, capacity)


@given(routings())
def test_copies_are_conserved_and_in_expert_order(case):
    plan = plan_dispatch(_routing(case), alone())
    topk = case.indices_TK.shape[1]
    experts = case.indices_TK.flatten()[plan.order.choice_N]
    assert plan.tokens_per_expert.tolist() == case.routing_map.sum(0).tolist()
    assert torch.equal(experts, experts.sort(stable=True).values)
    assert torch.equal(plan.order.token_N, plan.order.choice_N // topk)
    pairs = set(zip(plan.order.token_N.tolist(), experts.tolist(), strict=True))
    assert pairs == {tuple(p) for p in case.routing_map.nonzero().tolist()}


def test_earlier_tokens_come_first_at_an_expert():
    indices = torch.tensor([[1, 0], [0, 1], [1, 0]])
    order = copy_order(Routing(indices, torch.ones(3, 2), 2), 6)
    assert order.token_N.tolist() == [0, 1, 2, 0, 1, 2]
    assert order.choice_N.tolist() == [1, 2, 5, 0, 3, 4]


@given(routings())
def test_padded_experts_have_exactly_capacity_rows(case):
    capacity = int(case.routing_map.sum(0).max()) if case.routing_map.numel() else 0
    plan = plan_dispatch(_routing(case, capacity), alone())
    assert plan.tokens_per_expert.tolist() == [capacity] * case.num_experts
    empty = case.indices_TK.shape[0]
    by_expert = plan.order.token_N.view(case.num_experts, capacity).tolist()
    for expert, tokens in enumerate(by_expert):
        expected = case.routing_map[:, expert].nonzero().flatten().tolist()
        assert [t for t in tokens if t != empty] == expected


@given(routings(num_experts=6))
def test_gathered_plans_of_all_ranks_cover_each_choice_once(case):
    routing = _routing(case)
    total = 0
    for first in (0, 2, 4):
        plan = plan_gathered(routing, [len(case.indices_TK)], first, 2)
        total += len(plan.order.choice_N)
        assert (
            plan.tokens_per_expert.tolist()
            == case.routing_map[:, first : first + 2].sum(0).tolist()
        )
    assert total == case.routing_map.sum()
