"""2:4 sparse experts in real training: any layout, any optimizer, across checkpoints."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers.canonical import Piece, assemble
from helpers.layout import Layout
from helpers.runs import Job, Means, assert_same_run, merge, train
from torch import Tensor

from megatron_moe.config import MoEConfig

GROUPED = {"moe_grouped_gemm": True}
# No balancing loss: it belongs to a micro-batch, and their number is to change nothing.
MODEL = {
    "moe_ffn_hidden_size": 16,
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
    **GROUPED,
}
# A decay that is felt: with the usual one, leaving it out would pass for rounding.
SPARSE = MoEConfig(sparse_experts="2:4", sparse_decay=0.5)
JOB = Job(model=MODEL, moe=SPARSE, empty_experts=(1,))
PLACES = {
    "one-two-micro-batches": (1, Means(), {"micro_batch_size": 2}),
    "ep2-distopt": (2, Means(layout=Layout(ep=2), distributed_optimizer=True), {}),
    "etp2": (2, Means(layout=Layout(etp=2)), {}),
    "tp2": (2, Means(layout=Layout(tp=2)), {}),
    "dp2-distopt-overlap": (2, Means(distributed_optimizer=True, overlap=True), {}),
}


@dataclass(frozen=True)
class Step:
    """What one rank saw after one step: by layer, whole stacked tensors of this rank.

    Args:
        weights: Stacked weights, with whatever is outside of the masks.
        masks: The masks they were trained with.
        outside: Largest magnitude outside of the masks, in all that the optimizer steps and keeps.
        nonzeros: Most non-zeros in a group of four of the weights that the next batch would have.
    """

    weights: list[Tensor]
    masks: list[Tensor]
    outside: float
    nonzeros: int


@pytest.fixture(scope="module")
def one_process(pool):
    """The run on one process, and its masks."""
    record = merge(pool.run(train, JOB, Means(), world_size=1), per_token=False)
    return record, assemble(pool.run(_masks, JOB, Means(), world_size=1))


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_every_layout_has_the_same_run_and_masks(pool, one_process, place):
    world_size, means, changes = place
    job = replace(JOB, **changes)
    expected, masks = one_process
    ranks = pool.run(train, job, means, world_size=world_size, timeout=120)
    assert_same_run(merge(ranks, per_token=False), expected)
    found_masks = assemble(pool.run(_masks, job, means, world_size=world_size))
    assert found_masks.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(found_masks[name], mask), name
        assert (mask.view(-1, 4).sum(-1) == 2).all(), name


def _masks(world: Any, job: Job, means: Means) -> list[Piece]:
    """Train, and return the masks that fit the weights then."""
    from helpers.training_run import Training

    from megatron_moe.experts.sparse import sparse_linears

    training = Training(job, means)
    for _ in range(job.steps):
        training.forward_backward()
        training.update()
    training.gather_weights()
    linears = [linear for chunk in training.ddp for linear in sparse_linears(chunk)]
    masks = {id(linear.weight): linear.saved_state()["mask"].float() for linear in linears}
    pieces = training._pieces(lambda p: masks.get(id(p), torch.zeros(p.shape)))
    return [piece for piece in pieces if ".experts." in piece.name]


FREEZE = 2
KINDS = {
    "fp32": (1, Means(), {}),
    "fp32-distopt-dp2": (2, Means(distributed_optimizer=True, overlap=True), {}),
    "bf16": (1, Means(), {"bf16": True, "params_dtype": torch.bfloat16}),
    "bf16-distopt-dp2": (
        2,
        Means(distributed_optimizer=True, overlap=True),
        {"bf16": True, "params_dtype": torch.bfloat16},
    ),
    "fp16-distopt-ep2": (
        2,
        Means(layout=Layout(ep=2), distributed_optimizer=True),
        {"fp16": True, "params_dtype": torch.float16},
    ),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_frozen_masks_leave_exact_zeros_after_each_step(pool, kind):
    world_size, means, changes = kind
    moe = replace(SPARSE, sparse_decay=1e-3, sparse_freeze_iter=FREEZE)
    job = Job(model=MODEL | changes, moe=moe, steps=5)
    for steps in pool.run(_train_steps, job, means, world_size=world_size, timeout=120):
        for number, step in enumerate(steps, start=1):
            assert step.nonzeros <= 2
            outside = [w[~m] for w, m in zip(step.weights, step.masks, strict=True)]
            if number < FREEZE:
                assert step.outside > 0 and all(part.any() for part in outside)
                continue
            assert step.outside == 0.0, f"step {number}"
            assert not any(part.any() for part in outside)
            for mask, frozen in zip(step.masks, steps[FREEZE - 1].masks, strict=True):
                assert torch.equal(mask, frozen)
        moved = zip(steps[-1].weights, steps[-2].weights, strict=True)
        assert all(not torch.equal(new, old) for new, old in moved)


def test_the_start_survives_a_restart(pool):
    """Dense in iterations 0 and 1, of which the second is after a restart."""
    moe = replace(SPARSE, sparse_start_iter=2)
    job = Job(model=MODEL, moe=moe, steps=1)
    ((first, state),) = pool.run(_train_from, job, None, world_size=1)
    ((second, _),) = pool.run(_train_from, replace(job, steps=2), state, world_size=1)
    steps = [*first, *second]
    assert [all(m.all() for m in step.masks) for step in steps] == [True, True, False]
    assert all((m.view(-1, 4).sum(-1) == 2).all() for m in steps[2].masks)


def _train_steps(world: Any, job: Job, means: Means) -> list[Step]:
    from helpers.training_run import Training

    training = Training(job, means)
    return [_step(training) for _ in range(job.steps)]


def _train_from(world: Any, job: Job, state: dict | None) -> tuple[list[Step], dict]:
    from helpers.training_run import Training

    training = Training(job, Means())
    (chunk,) = training.chunks
    if state is not None:
        chunk.load_state_dict(state)
    steps = [_step(training) for _ in range(job.steps)]
    return steps, {k: v for k, v in chunk.state_dict().items() if v is not None}


def _step(training: Any) -> Step:
    from megatron_moe.experts.sparse import sparse_linears

    training.forward_backward()
    training.update()
    training.gather_weights()
    linears = [linear for chunk in training.ddp for linear in sparse_linears(chunk)]
    masks = [linear.mask.clone() for linear in linears]
    outside = _most_outside(training)
    nonzeros = 0
    for linear in linears:
        effective = linear.sparsity.effective(linear.weight, linear.mask)
        if linear.sparsity.applied:
            nonzeros = max(nonzeros, int((effective.view(-1, 4) != 0).sum(-1).max()))
    return Step([linear.weight.detach().clone() for linear in linears], masks, outside, nonzeros)


def _most_outside(training: Any) -> float:
    """By Megatron's own map from shards to parameters, where there are shards."""
    from megatron_moe.experts.sparse import sparse_linears

    masks = {
        lin.weight: lin.mask.view(-1) for chunk in training.ddp for lin in sparse_linears(chunk)
    }
    most, seen = 0.0, 0
    for optimizer in getattr(training.optimizer, "chained_optimizers", [training.optimizer]):
        for weight, stepped, start in _stepped(optimizer):
            if weight not in masks:
                continue
            outside = ~masks[weight][start : start + stepped.numel()]
            for value in (stepped, *optimizer.optimizer.state[stepped].values()):
                if value.numel() == stepped.numel():
                    seen += 1
                    most = max(most, float((value.reshape(-1) * outside).abs().max()))
    assert seen >= 3, "weights and both moments of some"
    return most


def _stepped(optimizer: Any) -> Any:
    """Parameters of the model with what is stepped for them, and where that begins."""
    if hasattr(optimizer, "_get_model_param_range_map"):
        groups = zip(
            [*optimizer.model_float16_groups, *optimizer.model_fp32_groups],
            [*optimizer.shard_fp32_from_float16_groups, *optimizer.shard_fp32_groups],
            strict=True,
        )
        for weights, shards in groups:
            for weight, shard in zip(weights, shards, strict=True):
                yield weight, shard, optimizer._get_model_param_range_map(weight)["param"].start
        return
    if hasattr(optimizer, "float16_groups"):
        pairs = zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True)
        for weights, mains in pairs:
            yield from ((w, m, 0) for w, m in zip(weights, mains, strict=True))
        return
    for group in optimizer.optimizer.param_groups:
        yield from ((p, p, 0) for p in group["params"])
