"""The same promises between ranks: uneven tokens, ranks without any, EP and ETP."""

import pytest
import torch
import torch.distributed as dist
from helpers.tolerances import assert_same

from megatron_moe.dispatch.dispatcher import DISPATCHERS
from megatron_moe.parallel import collectives
from megatron_moe.parallel.groups import ExpertGroups
from megatron_moe.route.choices.topk import pick_topk
from megatron_moe.route.decision import Routing
from megatron_moe.route.scores import weigh_chosen

LAYOUTS = [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]  # (EP, ETP)
TOKENS = [[4, 4, 4, 4], [5, 0, 3, 1], [0, 0, 0, 6]]
NUM_EXPERTS, TOPK, HIDDEN = 8, 3, 5


def make_groups(world, ep, etp):
    """ETP runs fastest, as in Megatron."""

    def mine(groups):
        made = [dist.new_group(list(ranks)) for ranks in groups]
        return next(g for g, ranks in zip(made, groups, strict=True) if world.rank in ranks)

    grid = torch.arange(ep * etp).view(ep, etp)
    alone = mine([[r] for r in range(ep * etp)])
    everybody = mine([list(range(ep * etp))])
    return ExpertGroups(
        ep=mine(grid.T.tolist()),
        etp=mine(grid.tolist()),
        edp=alone,
        tp_ep=everybody,
        tp_cp=everybody,
        tp_dp_cp=everybody,
    )


def random(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def route(num_tokens, seed, empty_expert=False, drops=False):
    logits = random(num_tokens, NUM_EXPERTS, seed=seed)
    if empty_expert:
        logits[:, 2] = -1e9
    picked = pick_topk(logits, TOPK)
    probs, indices = weigh_chosen(logits, picked), picked.indices_TK
    kept = random(num_tokens, TOPK, seed=seed + 1) > 0 if drops else None
    return Routing(indices, probs, NUM_EXPERTS, kept)


def adjointness(world, ep, etp, kind, tokens, drops):
    groups = make_groups(world, ep, etp)
    dispatcher = DISPATCHERS[kind](NUM_EXPERTS, groups)
    num_tokens = tokens[world.rank]
    x = random(num_tokens, HIDDEN, seed=world.rank)
    routing = route(num_tokens, 50 + world.rank, empty_expert=True, drops=drops)
    rows, _, plan = dispatcher.dispatch(x, routing)
    assert rows.shape[0] == plan.tokens_per_expert.sum()
    y = random(*rows.shape, seed=100 + world.rank)
    back = dispatcher.combine(y, plan)
    sums = torch.stack([(rows * y).sum(), (x * back).sum()])
    dist.all_reduce(sums)
    copies = torch.tensor([len(rows), int(routing.tokens_per_expert().sum()) * etp])
    dist.all_reduce(copies)
    return sums, copies


@pytest.mark.parametrize("drops", [False, True], ids=["all", "drops"])
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
@pytest.mark.parametrize("kind", sorted(DISPATCHERS))
@pytest.mark.parametrize(("ep", "etp"), LAYOUTS)
def test_combine_is_the_adjoint_of_dispatch(torch_pool, ep, etp, kind, tokens, drops):
    for sums, copies in torch_pool.run(
        adjointness, ep, etp, kind, tokens, drops, world_size=ep * etp
    ):
        assert_same(sums[0], sums[1])
        assert copies[0] == copies[1], "copies received by all ranks = copies sent, once per ETP"


def whole_path(world, ep, etp, kind, tokens, dtype):
    """Experts y = W_e x, cut over ETP along the contracted axis, forward and backward."""
    groups = make_groups(world, ep, etp)
    dispatcher = DISPATCHERS[kind](NUM_EXPERTS, groups)
    num_local = NUM_EXPERTS // ep
    experts = random(NUM_EXPERTS, HIDDEN, HIDDEN, seed=7, dtype=dtype)
    mine = experts[groups.ep.rank() * num_local :][:num_local].clone().requires_grad_()
    x = random(tokens[world.rank], HIDDEN, seed=world.rank, dtype=dtype).requires_grad_()
    decision = route(tokens[world.rank], 50 + world.rank)
    probs = decision.probs_TK.float().requires_grad_()
    rows, weights, plan = dispatcher.dispatch(x, Routing(decision.indices_TK, probs, NUM_EXPERTS))
    summand = torch.zeros(HIDDEN, dtype=dtype)
    summand[groups.etp.rank() :: etp] = 1  # this ETP rank's part of the contraction
    parts = rows.split(plan.tokens_per_expert.tolist())
    results = torch.cat([(r * summand) @ w for r, w in zip(parts, mine, strict=True)])
    out = dispatcher.combine((results * weights.unsqueeze(1)).to(dtype), plan)
    grad = random(*out.shape, seed=200 + world.rank, dtype=dtype)
    grads = torch.autograd.grad((out * grad).sum(), (x, probs, mine))
    full = torch.zeros(NUM_EXPERTS, HIDDEN, HIDDEN, dtype=dtype)
    full[groups.ep.rank() * num_local :][:num_local] = grads[2]
    dist.all_reduce(full)
    return out.detach(), grads[0], grads[1], full


def expected_path(tokens, dtype):
    experts = random(NUM_EXPERTS, HIDDEN, HIDDEN, seed=7, dtype=dtype).requires_grad_()
    outs, leaves, loss = [], [], 0.0
    for rank, num_tokens in enumerate(tokens):
        x = random(num_tokens, HIDDEN, seed=rank, dtype=dtype).requires_grad_()
        decision = route(num_tokens, 50 + rank)
        probs = decision.probs_TK.float().requires_grad_()
        chosen = torch.einsum("td,tkdf->tkf", x, experts[decision.indices_TK])
        out = (chosen * probs.unsqueeze(2)).sum(1).to(dtype)
        loss = loss + (out * random(*out.shape, seed=200 + rank, dtype=dtype)).sum()
        outs.append(out.detach())
        leaves += [x, probs]
    grads = torch.autograd.grad(loss, [*leaves, experts])
    return outs, grads[0:-1:2], grads[1:-1:2], grads[-1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
@pytest.mark.parametrize("kind", sorted(DISPATCHERS))
@pytest.mark.parametrize(("ep", "etp"), LAYOUTS)
def test_results_and_gradients_do_not_depend_on_the_layout(
    torch_pool, ep, etp, kind, tokens, dtype
):
    tokens = tokens[-ep * etp :]
    outs, grads_x, grads_p, grad_w = expected_path(tokens, dtype)
    ranks = torch_pool.run(whole_path, ep, etp, kind, tokens, dtype, world_size=ep * etp)
    for rank, (out, grad_x, grad_p, full) in enumerate(ranks):
        assert_same(out, outs[rank], f"output of rank {rank}")
        assert_same(grad_x, grads_x[rank], f"input gradient of rank {rank}")
        assert_same(grad_p, grads_p[rank], f"weight gradient of rank {rank}")
        assert_same(full, grad_w, "expert gradient")


def bfloat16_weights(world):
    """fp32 weights travel as bits beside half-precision rows: not one is rounded."""
    groups = make_groups(world, 2, 1)
    dispatcher = DISPATCHERS["alltoall"](NUM_EXPERTS, groups)
    decision = route(6, 50 + world.rank)
    probs = decision.probs_TK.float()
    x = random(6, HIDDEN, seed=world.rank, dtype=torch.bfloat16)
    _, weights, _ = dispatcher.dispatch(x, Routing(decision.indices_TK, probs, NUM_EXPERTS))
    return probs, weights


def test_weights_are_not_rounded_on_the_way(torch_pool):
    ranks = torch_pool.run(bfloat16_weights, world_size=2)
    sent = torch.cat([probs.flatten() for probs, _ in ranks]).sort().values
    received = torch.cat([weights for _, weights in ranks]).sort().values
    assert torch.equal(sent, received)


def count_calls(world):
    """How many all-to-alls a step takes."""
    groups = make_groups(world, 2, 1)
    dispatcher = DISPATCHERS["alltoall"](NUM_EXPERTS, groups)
    calls = []
    original = dist.all_to_all_single

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return original(*args, **kwargs)

    dist.all_to_all_single = counted
    try:
        x = random(6, HIDDEN, seed=world.rank).requires_grad_()
        decision = route(6, world.rank)
        probs = decision.probs_TK.requires_grad_()
        rows, weights, plan = dispatcher.dispatch(
            x, Routing(decision.indices_TK, probs, NUM_EXPERTS)
        )
        dispatcher.combine(rows * weights.unsqueeze(1), plan).sum().backward()
    finally:
        dist.all_to_all_single = original
    return len(calls)


def test_a_step_has_four_all_to_alls(torch_pool):
    assert torch_pool.run(count_calls, world_size=2) == [4, 4]


def collective_gradients(world):
    sizes = [3, 0, 2, 1]
    group = dist.group.WORLD
    x = random(sizes[world.rank], 2, seed=world.rank)
    y = random(6, 2, seed=10 + world.rank)
    gathered = collectives.all_gather(x, sizes, group)
    scattered = collectives.reduce_scatter(y, sizes, group)
    sums = torch.stack([(gathered * y).sum(), (x * scattered).sum()])
    dist.all_reduce(sums)
    return sums


def test_all_gather_and_reduce_scatter_are_adjoint(torch_pool):
    for sums in torch_pool.run(collective_gradients, world_size=4):
        assert_same(sums[0], sums[1])


def wrong_rows(world):
    collectives.all_to_all(torch.zeros(3, 2), [1, 1], [1, 1], dist.group.WORLD)


def test_rows_that_do_not_match_the_splits(torch_pool):
    with pytest.raises(AssertionError, match=r"3 rows, but input_splits \[1, 1\]"):
        torch_pool.run(wrong_rows, world_size=2)
