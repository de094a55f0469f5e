"""A step that upstream's MoE layer and ours both take, and what each made of it.

The gate of the layer under test is the identity, so that hidden states are logits. This half knows
nothing of Megatron; the half that runs the layer is `faults_run.py`, imported in the workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from helpers.layout import Layout
from helpers.reference_moe import ReferenceRouter, balance_loss, balance_scores, choose
from torch import Tensor

TOP2 = ReferenceRouter(topk=2)
TOP1 = {"moe_router_topk": 1, "moe_router_pre_softmax": True}
CAPACITY = {"moe_expert_capacity_factor": 1.0}
NO_LOSS = {"moe_router_load_balancing_type": "none"}
SIGMOID = {"moe_router_score_function": "sigmoid"}
BIASED = SIGMOID | {"moe_router_enable_expert_bias": True}


def balancing(kind: str, coeff: float = 0.1) -> dict[str, Any]:
    """One balancing loss, as fields of ``TransformerConfig``."""
    return {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": coeff}


def logits(*shape: int, seed: int = 3) -> Tensor:
    """Random logits that favour some experts, as an untrained gate's do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) + torch.linspace(-0.5, 0.5, shape[-1])


def padding(sequence_length: int, *lengths: int) -> Tensor:
    """True behind the length of each sequence, ``(B, S)``."""
    return torch.arange(sequence_length) >= torch.tensor(lengths).unsqueeze(1)


def top2_counts(hidden: Tensor, num_experts: int = 8) -> Tensor:
    """Tokens that choose each of the first ``num_experts`` experts, ``(E,)``."""
    chosen = hidden[..., :num_experts].topk(2).indices
    return torch.bincount(chosen.flatten(), minlength=num_experts)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One global batch through one MoE layer: forward, backward, Megatron's finalising.

    Args:
        hidden: Micro-batches of each data-parallel rank, ``[dp][i]`` of ``(S, B, D)``: the logits
            of D experts (of the first E, where a layer has fewer).
        padding: True for padding, ``[dp][i]`` of ``(B, S)``; None for none.
        model: Fields of ``TransformerConfig``.
        set_late: Fields set on the finished configuration, past its own checks.
        impl: ``plugin`` or ``megatron``.
        layout: Sizes of the parallel axes.
        num_experts: E of each layer of the model.
        expert_bias_E: Expert bias before the step.
        main_loss: Whether the output has a loss besides the router's own.
        recompute_noise: What the layer's input differs by when it is computed again for the
            backward pass; None for no recompute.
        mtp_passes: Passes through the layer as a repeated multi-token-prediction layer; 0 if it
            is none.
        evaluate: Whether the layer is in evaluation mode (with gradients on).
        may_raise: Whether an error is a result like any other.
    """

    hidden: list[list[Tensor]]
    padding: list[list[Tensor]] | None = None
    model: dict[str, Any] = field(default_factory=dict)
    set_late: dict[str, Any] = field(default_factory=dict)
    impl: str = "plugin"
    layout: Layout = field(default_factory=Layout)
    num_experts: tuple[int, ...] = (8,)
    expert_bias_E: Tensor | None = None
    main_loss: bool = False
    recompute_noise: float | None = None
    mtp_passes: int = 0
    evaluate: bool = False
    may_raise: bool = False

    def valid(self, dp_rank: int, i: int) -> Tensor:
        """True for tokens that count, ``(S, B)``."""
        if self.padding is None:
            return torch.ones(self.hidden[dp_rank][i].shape[:2], dtype=torch.bool)
        return ~self.padding[dp_rank][i].t()


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one rank says.

    Args:
        error: How the step ended, ``Class: first line``; None if well. All else is then empty.
        maps: Choices carried out, ``(T, E)`` bool of each pass through a router, in order.
        router_grad: Of the first layer, as the optimizer gets it, ``(E, D)``.
        bias_moves: Sign of what finalising did to the expert bias, ``(E,)`` of each layer.
        logged: The losses that Megatron's tracker would report.
        said: Warnings given while the model was built, and records of the plugin's logger.
    """

    error: str | None = None
    maps: list[Tensor] = field(default_factory=list)
    router_grad: Tensor = field(default_factory=lambda: torch.zeros(0))
    bias_moves: list[Tensor] = field(default_factory=list)
    logged: dict[str, float] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


def run_step(world: Any, step: Step) -> StepRecord:
    """Run ``step`` on this rank; to be sent to the pool."""
    from helpers.faults_run import run_step_rank

    return run_step_rank(step)


def run_both(pool: Any, step: Step, world_size: int = 1) -> list[StepRecord]:
    """Return rank 0's record from upstream's layer, then from ours."""
    return [
        pool.run(run_step, replace(step, impl=impl), world_size=world_size)[0]
        for impl in ("megatron", "plugin")
    ]


def true_router_grad(step: Step, loss: str, options: ReferenceRouter, coeff: float) -> Tensor:
    """Work out the gate's gradient from the written formula, ``(E, D)`` fp64.

    Args:
        step: Without recompute or repeated passes.
        loss: ``aux`` and ``z`` average over the micro-batches of all data-parallel ranks;
            ``global`` counts them as one.
        options: How the router chooses.
        coeff: Of the loss.
    """
    weight = torch.eye(step.num_experts[0], dtype=torch.float64, requires_grad=True)
    all_logits, all_chosen = [], []
    for dp_rank, micro_batches in enumerate(step.hidden):
        for i, hidden in enumerate(micro_batches):
            keep = step.valid(dp_rank, i).flatten()
            logits = hidden.double().flatten(0, 1)[keep] @ weight.T
            all_logits.append(logits)
            all_chosen.append(choose(logits, options, [True] * len(logits))[1])
    if loss == "global":
        all_logits, all_chosen = [torch.cat(all_logits)], [torch.cat(all_chosen)]
    if loss == "z":
        losses = [logits.logsumexp(-1).square().mean() for logits in all_logits]
    else:
        losses = [
            balance_loss(balance_scores(x, options.score_function), chosen, options.topk)
            for x, chosen in zip(all_logits, all_chosen, strict=True)
        ]
    (coeff * torch.stack(losses).mean()).backward()
    assert weight.grad is not None
    return weight.grad


def times_true(found: Tensor, true: Tensor) -> float:
    """How many times the true gradient is in the one found (1: all of it, once)."""
    return float((found.double() * true).sum() / true.square().sum())


def error_of(found: Tensor, true: Tensor) -> float:
    """Length of the error, in lengths of the true gradient."""
    return float((found.double() - true).norm() / true.norm())


def wrong_moves(record: StepRecord, counts: Sequence[Tensor]) -> int:
    """Experts whose bias did not move towards the mean load, of all layers.

    Args:
        record: What the layers did.
        counts: Tokens that each expert of each layer truly got, ``(E,)`` int64.
    """
    return sum(
        int((moves != (count.sum() - count * len(count)).sign()).sum())
        for moves, count in zip(record.bias_moves, counts, strict=True)
    )
