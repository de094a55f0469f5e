"""A training run as a value: what is trained, by what means, and what came out.

This half knows nothing of Megatron, so that pytest's own process need not import it; the half that
trains is `training_run.py`, imported in the workers.
"""

from dataclasses import dataclass, field
from typing import Any

from helpers.canonical import Piece, assemble
from helpers.layout import Layout
from helpers.tolerances import assert_same
from torch import Tensor

from megatron_moe.config import MoEConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, apart from the layout.

    Args:
        model: Fields of ``TransformerConfig`` that differ from the small default.
        moe: The plugin's own options.
        num_sequences: Sequences of the global batch.
        micro_batch_size: Sequences of a micro-batch.
        sequence_length: Tokens of a sequence.
        masked_tokens: Whether some tokens are left out of the loss, unevenly.
        padded_tokens: Whether sequences end in padding, of uneven length, which goes to no expert.
        empty_experts: Experts that no token chooses.
        steps: Optimizer steps.
    """

    model: dict[str, Any] = field(default_factory=dict)
    moe: MoEConfig = field(default_factory=MoEConfig)
    num_sequences: int = 4
    micro_batch_size: int = 1
    sequence_length: int = 8
    masked_tokens: bool = False
    padded_tokens: bool = False
    empty_experts: tuple[int, ...] = ()
    steps: int = 2


@dataclass(frozen=True, kw_only=True)
class Means:
    """How it is trained: what must not change any result.

    Args:
        layout: Sizes of the parallel axes.
        impl: ``plugin`` or ``megatron``.
        model: Fields of ``TransformerConfig`` (dispatcher, recompute, ...).
        moe: Fields of ``MoEConfig`` (form of the experts' GEMM, ...).
        distributed_optimizer: Whether optimizer states are sharded over data-parallel ranks.
        overlap: Whether gradients are reduced during the backward pass, in small buckets, and with
            a distributed optimizer weights gathered during the forward pass.
    """

    layout: Layout = field(default_factory=Layout)
    impl: str = "plugin"
    model: dict[str, Any] = field(default_factory=dict)
    moe: dict[str, Any] = field(default_factory=dict)
    distributed_optimizer: bool = False
    overlap: bool = False


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """What one rank can say of a run; ``merge`` makes one record of all."""

    losses: list[list[tuple[float, int]]]  # by step, by micro-batch: sum and token count
    grads: list[Piece]  # of the first step, finalised, unscaled, before clipping
    grad_norms: list[float]
    weights: list[Piece]  # after the last step
    logged: list[dict[str, float]]


def train(world: Any, job: Job, means: Means) -> RankRecord:
    """Run ``job`` by ``means`` on this rank; to be sent to the pool."""
    from helpers.training_run import train_rank

    return train_rank(job, means)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A training run in a form that does not depend on its layout."""

    losses: list[float]
    grads: dict[str, Tensor]
    grad_norms: list[float]
    weights: dict[str, Tensor]
    logged: list[dict[str, float]]


def merge(ranks: list[RankRecord], *, per_token: bool) -> Record:
    """Merge the records of all ranks; those that should agree must.

    Args:
        ranks: What each rank says.
        per_token: Whether the loss is the mean over all tokens, not over micro-batches.
    """
    first = ranks[0]
    for rank, other in enumerate(ranks):
        assert_same(
            dict(enumerate(other.grad_norms)),
            dict(enumerate(first.grad_norms)),
            f"gradient norm of rank {rank}, by step",
        )
        for step, scalars in enumerate(other.logged):
            assert_same(scalars, first.logged[step], f"rank {rank}, step {step}: logged")
    return Record(
        losses=[
            _loss([r.losses[step] for r in ranks], per_token) for step in range(len(first.losses))
        ],
        grads=assemble([r.grads for r in ranks]),
        grad_norms=first.grad_norms,
        weights=assemble([r.weights for r in ranks]),
        logged=first.logged,
    )


def _loss(stores: list[list[tuple[float, int]]], per_token: bool) -> float:
    """Mean loss of a step; tensor-parallel ranks repeat the same micro-batches, harmlessly."""
    found = [entry for store in stores for entry in store]
    if per_token:
        return sum(total for total, _ in found) / sum(count for _, count in found)
    return sum(total / count for total, count in found) / len(found)


def assert_same_run(found: Record, expected: Record, scale: float = 1.0) -> None:
    """Compare everything two runs say, the most telling first."""
    steps = range(len(expected.losses))
    assert_same(found.losses[0], expected.losses[0], "loss of step 0", scale)
    assert_same(found.logged[0], expected.logged[0], "logged in step 0", scale)
    assert_same(found.grads, expected.grads, "gradient", scale)
    assert_same(found.grad_norms[0], expected.grad_norms[0], "gradient norm of step 0", scale)
    assert_same(found.weights, expected.weights, "weight after the last step", scale)
    for step in steps[1:]:
        assert_same(found.losses[step], expected.losses[step], f"loss of step {step}", scale)
        assert_same(found.logged[step], expected.logged[step], f"logged in step {step}", scale)
        assert_same(found.grad_norms[step], expected.grad_norms[step], f"norm, step {step}", scale)
