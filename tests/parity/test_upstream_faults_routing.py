"""What Megatron's decision and its counts get wrong, measured beside ours; see the losses' file."""

from dataclasses import replace

import pytest
import torch
from helpers.faults import (
    BIASED,
    CAPACITY,
    NO_LOSS,
    TOP1,
    Step,
    balancing,
    logits,
    padding,
    run_both,
    top2_counts,
    wrong_moves,
)
from helpers.faults_table import MENDED
from torch import Tensor


@pytest.mark.parametrize(
    ("num_tokens", "what"),
    [(16, "crashes"), (8, "masks experts, not tokens, where there are as many")],
)
def test_padding_with_expert_bias(pool, faults, num_tokens, what):
    hidden, valid = logits(num_tokens, 1, 8, seed=num_tokens), num_tokens - 3
    step = Step(
        hidden=[[hidden]],
        padding=[[padding(num_tokens, valid)]],
        model=BIASED | NO_LOSS,
        may_raise=num_tokens != 8,
    )
    counts = [top2_counts(hidden[:valid])]
    upstream, ours = run_both(pool, step)
    assert upstream.error is None or "The size of tensor a (8) must match" in upstream.error
    faults.compare(
        f"padding mask with expert bias: {what}",
        measured=f"biases that move the wrong way, of 8 ({num_tokens} tokens)",
        upstream=[_kind(upstream.error) or wrong_moves(upstream, counts)],
        ours=[ours.error or wrong_moves(ours, counts)],
        right=[0],
        remedy="padding is left out of the decision itself, so of every count",
    )


def test_capacity_with_expert_bias(pool, faults):
    model = BIASED | NO_LOSS | CAPACITY | {"moe_pad_expert_input_to_capacity": True}
    hidden = logits(64, 1, 8)
    both = run_both(pool, Step(hidden=[[hidden]], model=model))
    counts = [top2_counts(hidden)]
    faults.compare(
        "expert bias with padding to capacity: every expert seems to get as many tokens",
        measured="biases that do not move towards the mean load, of 8",
        upstream=[wrong_moves(both[0], counts)],
        ours=[wrong_moves(both[1], counts)],
        right=[0],
        remedy="counted as chosen, before capacity",
    )


def test_counts_in_half_precision(pool, faults):
    model = BIASED | NO_LOSS | {"bf16": True, "params_dtype": torch.bfloat16}
    generator = torch.Generator().manual_seed(3)  # no favourites: a router in balance
    micro_batches = list(torch.randn(32, 1024, 1, 8, generator=generator))
    step = Step(hidden=[micro_batches], model=model | {"moe_router_dtype": "fp32"})
    both = run_both(pool, step)
    # What each really sent to its experts, in int64.
    counts = [[sum(m.sum(0) for m in record.maps)] for record in both]
    upstream, ours = (wrong_moves(r, c) for r, c in zip(both, counts, strict=True))
    faults.compare(
        "tokens counted in bf16 (`Float16Module` casts the counts)",
        measured="biases that move the wrong way, of 8, after 32,768 tokens",
        upstream=[upstream],
        ours=[ours],
        right=[0],
        remedy="counts are int64 and never cast; the bias stays fp32",
    )


def test_evaluation_moves_the_bias(pool, faults):
    hidden = logits(64, 1, 8)
    step = Step(hidden=[[hidden]], model=BIASED | NO_LOSS, evaluate=True)
    moved = [int(record.bias_moves[0].ne(0).sum()) for record in run_both(pool, step)]
    faults.compare(
        "counted in evaluation too (with gradients on)",
        measured="biases, of 8, that an evaluation pass alone moves",
        upstream=[moved[0]],
        ours=[moved[1]],
        right=[0],
        remedy="only training passes count, and each once",
    )


def test_layers_with_unlike_numbers_of_experts(pool, faults):
    hidden = logits(64, 1, 8)
    step = Step(hidden=[[hidden]], model=BIASED | NO_LOSS, num_experts=(8, 4), may_raise=True)
    counts = [top2_counts(hidden, n) for n in step.num_experts]
    upstream, ours = run_both(pool, step)
    assert upstream.error is None or "stack expects each tensor to be equal size" in upstream.error
    faults.compare(
        "expert bias in layers with unlike numbers of experts: the update crashes",
        measured="biases that move the wrong way, of 8 + 4",
        upstream=[_kind(upstream.error) or wrong_moves(upstream, counts)],
        ours=[ours.error or wrong_moves(ours, counts)],
        right=[0],
        remedy="one flat all-reduce for all layers, whatever their sizes",
    )


def test_position_policy(pool, faults):
    model = NO_LOSS | TOP1 | CAPACITY | {"moe_token_drop_policy": "position"}
    hidden = torch.zeros(64, 1, 8)
    hidden[..., 0] = 5.0 + torch.arange(64).unsqueeze(1) / 64
    both = run_both(pool, Step(hidden=[[hidden]], model=model))
    late = [int(record.maps[0][8:, 0].sum()) for record in both]
    assert [int(record.maps[0].sum()) for record in both] == [8, 8]
    faults.compare(
        "`position` drop policy keeps arbitrary tokens (top-k of equal ones)",
        measured="kept choices, of 8, that came behind a dropped one (64 tokens, one expert)",
        upstream=[late[0]],
        ours=[late[1]],
        right=[0],
        remedy="a stable sort: first come, first served",
    )


def test_sinkhorn_at_large_logits(pool, faults):
    model = balancing("sinkhorn", 0.0) | {"moe_router_topk": 1}
    hidden = logits(64, 1, 8)
    right = sinkhorn_choice(hidden.flatten(0, 1).double())
    elsewhere = []
    for shift in (0.0, 100.0):  # a constant on all logits of a token changes no share
        both = run_both(pool, Step(hidden=[[hidden + shift]], model=model))
        elsewhere.append([int((r.maps[0].int().argmax(1) != right).sum()) for r in both])
    assert elsewhere[0] == [0, 0]
    faults.compare(
        "`sinkhorn`: NaN at large logits",
        measured="tokens, of 64, sent elsewhere once 100 is added to every logit",
        upstream=[elsewhere[1][0]],
        ours=[elsewhere[1][1]],
        right=[0],
        remedy="sinkhorn in the log domain, a fixed number of iterations",
    )


def sinkhorn_choice(logits_TE: Tensor) -> Tensor:
    """The best expert of each token when all experts get equal shares, ``(T,)``, to convergence."""
    column_E = torch.zeros(logits_TE.shape[1], dtype=torch.float64)
    for _ in range(2000):
        row_T = -(logits_TE + column_E).logsumexp(1)
        column_E = -(logits_TE + row_T.unsqueeze(1)).logsumexp(0)
    return (logits_TE + column_E).argmax(1)


def test_near_ties_under_recompute(pool, faults):
    hidden = logits(64, 1, 8)
    order = hidden.argsort(-1, descending=True)
    third = hidden.gather(-1, order[..., 2:3])
    hidden = hidden.scatter(-1, order[..., 1:2], third + 1e-7)  # second and third: a near-tie
    model = NO_LOSS | {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    step = Step(hidden=[[hidden]], model=model, main_loss=True, recompute_noise=1e-6)
    moved = []
    for record in run_both(pool, step):
        first, second = record.maps
        moved.append(int((first != second).any(1).sum()))
    faults.compare(
        "near-ties routed again under recompute",
        measured="tokens, of 64, sent to other experts in the backward pass "
        "(input differs by 1e-6 there)",
        upstream=[moved[0]],
        ours=[moved[1]],
        right=[0],
        remedy="the decision of the forward pass is kept; weights are computed from it again",
    )


def test_top1_without_gradient(pool, faults):
    step = Step(hidden=[[logits(16, 1, 8)]], model=NO_LOSS | TOP1, main_loss=True)
    sound = run_both(pool, step)
    assert all(float(record.router_grad.norm()) > 1e-3 for record in sound)
    late = replace(step, set_late={"moe_router_pre_softmax": False}, may_raise=True)
    upstream, ours = run_both(pool, late)
    assert float(upstream.router_grad.norm()) == 0.0, MENDED
    said = ours.error or f"{float(ours.router_grad.norm()):.3f}"
    refused = said.startswith("MoEConfigError: ") and "--moe-router-pre-softmax" in said
    faults.compare(
        "top-1 with softmax over the chosen: the router gets no gradient of the language model",
        measured="router's gradient (TransformerConfig refuses this, but not on an object "
        "changed afterwards)",
        upstream=["0"],
        ours=["refused" if refused else said],
        right=["refused"],
        remedy="the layer checks the configuration it is built with",
    )


def _kind(error: str | None) -> str | None:
    return error and error.partition(":")[0]
