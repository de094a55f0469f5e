"""One MoE layer alone, as a value: what goes in on each rank, what comes out of all of them.

Without attention around it the layer can be run with context parallelism, in fp64, and with another
number of tokens (also none) on each data-parallel rank. Knows nothing of Megatron; the half that
runs the layer is `layer_run.py`, imported in the workers.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from helpers.canonical import Piece, canonical_tensor, join
from helpers.layout import Layout
from helpers.reference_moe import (
    ReferenceExperts,
    ReferenceRouter,
    reference_moe,
)
from torch import Tensor

from megatron_moe.config import MoEConfig


@dataclass(frozen=True, kw_only=True)
class LayerJob:
    """One forward and backward pass of one layer.

    Args:
        model: Fields of ``TransformerConfig``.
        moe: The plugin's own options.
        training: Whether the layer trains, or evaluates (then without losses and counts).
        batches: Micro-batch of each data-parallel rank, ``(S, B, D)``; S may differ and be 0.
        cotangents: What each output is multiplied with to make the loss, same shapes.
        padding: True for padding, ``(B, S)``, by data-parallel rank; None for none.
        empty_experts: Experts that no token chooses.
        impl: ``plugin`` or ``megatron``.
        dtype: Of weights and activations.
    """

    model: dict[str, Any] = field(default_factory=dict)
    moe: MoEConfig = field(default_factory=MoEConfig)
    training: bool = True
    batches: list[Tensor]
    cotangents: list[Tensor]
    padding: list[Tensor] | None = None
    empty_experts: tuple[int, ...] = ()
    impl: str = "plugin"
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What one rank says.

    Args:
        dp_rank: Whose micro-batch it worked on.
        part: Which slice of its sequence: slices of the TP × CP ranks, in order.
        output: ``(S / parts, B, D)``.
        input_grad: Same shape.
        grads: Its own contributions to the parameters' gradients, not reduced.
        logged: MoE losses, as Megatron's tracker reports them.
        routing_map: Choices carried out, ``(S / parts, B, E)`` bool.
        state: The router's state after the global batch, by buffer name.
    """

    dp_rank: int
    part: int
    output: Tensor
    input_grad: Tensor
    grads: list[Piece]
    logged: dict[str, float]
    routing_map: Tensor
    state: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """The records of all ranks in one: outputs and input gradients by data-parallel rank.

    ``routing_maps`` (by data-parallel rank) and ``state`` are empty where a reference says nothing
    of them.
    """

    outputs: list[Tensor]
    input_grads: list[Tensor]
    grads: dict[str, Tensor]
    logged: dict[str, float]
    routing_maps: list[Tensor] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)


def random_batches(
    lengths: list[int],
    *,
    batch_size: int = 2,
    hidden_size: int = 16,
    dtype: torch.dtype = torch.float64,
    seed: int = 5,
) -> dict[str, list[Tensor]]:
    """Return ``batches`` and ``cotangents`` of a :class:`LayerJob`; one length for each DP rank."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, batch_size, hidden_size) for n in lengths]
    drawn = [
        [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
        for _ in range(2)
    ]
    return {"batches": drawn[0], "cotangents": drawn[1]}


def run_layer(world: Any, job: LayerJob, layout: Layout) -> LayerRecord:
    """Run ``job`` on this rank of a layout; to be sent to the pool."""
    from helpers.layer_run import run_layer_rank

    return run_layer_rank(job, layout)


def merge_layer(records: list[LayerRecord]) -> LayerResult:
    """Put slices together and sum the contributions to each gradient."""
    batches: dict[int, dict[int, LayerRecord]] = {}
    for record in records:
        batches.setdefault(record.dp_rank, {})[record.part] = record
    ordered = [[parts[i] for i in sorted(parts)] for _, parts in sorted(batches.items())]
    sums: dict[str, dict[int, Piece]] = {}
    for piece in (piece for record in records for piece in record.grads):
        parts = sums.setdefault(piece.name, {})
        known = parts.get(piece.cut.index)
        total = piece.tensor if known is None else known.tensor + piece.tensor
        parts[piece.cut.index] = Piece(piece.name, piece.cut, total)
    return LayerResult(
        outputs=[torch.cat([r.output for r in parts]) for parts in ordered],
        input_grads=[torch.cat([r.input_grad for r in parts]) for parts in ordered],
        grads={name: join(list(parts.values())) for name, parts in sorted(sums.items())},
        logged=records[0].logged,
        routing_maps=[torch.cat([r.routing_map for r in parts]) for parts in ordered],
        state=_same_state(records),
    )


def _same_state(records: list[LayerRecord]) -> dict[str, Tensor]:
    """The routers' state, which every rank must have the same."""
    first = records[0].state
    for rank, record in enumerate(records):
        assert record.state.keys() == first.keys()
        for name, value in record.state.items():
            # NaN stands for what is not known yet.
            same = torch.equal(value.nan_to_num(), first[name].nan_to_num())
            assert same, f"{name} of rank {rank} is not that of rank 0"
    return first


def reference_layer(
    job: LayerJob, router: ReferenceRouter, coeffs: dict[str, float]
) -> LayerResult:
    """Work out by naive loops what a layer must give, from the same canonical weights.

    Args:
        job: Of the default sizes but for ``num_moe_experts``; fields that the reference router
            states are not read from ``job.model``.
        router: The router's options.
        coeffs: Coefficients of ``aux_loss``, ``seq_aux_loss`` and ``z_loss``.
    """
    num_experts = job.model.get("num_moe_experts", 4)
    weights = _reference_weights(job, num_experts)
    stacked = [
        torch.stack([weights[f"experts.{e}.{n}.weight"] for e in range(num_experts)])
        for n in ("linear_fc1", "linear_fc2")
    ]
    gated = job.model.get("gated_linear_unit", True)
    experts = ReferenceExperts(fc1=stacked[0], fc2=stacked[1], gated=gated)
    inputs = [x.clone().requires_grad_() for x in job.batches]
    total, outputs, losses = torch.zeros((), dtype=job.dtype), [], []
    for i, (x, cotangent) in enumerate(zip(inputs, job.cotangents, strict=True)):
        result = reference_moe(
            x.flatten(0, 1),
            weights["router.weight"],
            experts,
            router,
            padding=None if job.padding is None else job.padding[i].t().flatten(),
            num_sequences=x.shape[1],
        )
        outputs.append(result.output.view_as(x))
        total = total + (outputs[-1] * cotangent).sum()
        losses.append({name: getattr(result, name) for name in coeffs})
        total = total + sum(coeffs[name] * loss for name, loss in losses[-1].items())
    total.backward()
    return LayerResult(
        outputs=[y.detach() for y in outputs],
        input_grads=[_grad_of(x) for x in inputs],
        grads={name: _grad_of(weight) for name, weight in sorted(weights.items())},
        logged={n: float(sum(loss[n].detach() for loss in losses) / len(losses)) for n in coeffs},
    )


def _grad_of(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad  # None where no token came by


def _reference_weights(job: LayerJob, num_experts: int) -> dict[str, Tensor]:
    hidden, ffn = job.batches[0].shape[-1], job.model.get("moe_ffn_hidden_size", 12)
    rows = 2 * ffn if job.model.get("gated_linear_unit", True) else ffn
    shapes = {"router.weight": (num_experts, hidden)}
    for e in range(num_experts):
        shapes[f"experts.{e}.linear_fc1.weight"] = (rows, hidden)
        shapes[f"experts.{e}.linear_fc2.weight"] = (hidden, ffn)
    return {
        name: canonical_tensor(name, shape, job.empty_experts).to(job.dtype).requires_grad_()
        for name, shape in shapes.items()
    }
