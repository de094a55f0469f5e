"""FP16 steps of a small GPT on one rank, with Megatron's dynamic loss scalers looked at."""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from helpers.runs import Job, Means
from helpers.training_run import Training
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What happens to the scale.

    Args:
        job: In fp16.
        means: Layout and optimizer.
        scale: At the start.
        growth_interval: Good steps after which the scale doubles.
        spoilt: Steps in which an infinity stands in the first gradient of ``where``.
        where: ``experts`` or ``router``.
        upstream: Whether Megatron's chain is left to itself.
    """

    job: Job
    means: Means
    scale: float
    growth_interval: int = 1000
    spoilt: tuple[int, ...] = ()
    where: str = "experts"
    upstream: bool = False


@dataclass(frozen=True, kw_only=True)
class StepSeen:
    """One step: the scale of each optimizer before it, and what it did.

    Args:
        scales: Before the step.
        stepped: Whether weights were updated.
        unchanged: Whether all weights are what they were.
        finite: Whether all weights are finite.
        expert_factor: What the optimizer takes an expert's gradient for, divided by what it is.
        loss: Of the first micro-batch.
    """

    scales: list[float]
    stepped: bool
    unchanged: bool
    finite: bool
    expert_factor: float
    loss: float


def scaler_steps(world: Any, plan: Plan) -> list[StepSeen]:
    """Train; to be sent to the pool."""
    training = Training(plan.job, plan.means)
    chain = training.optimizer
    optimizers = getattr(chain, "chained_optimizers", [chain])
    if plan.upstream:
        chain.prepare_grads = partial(inspect.unwrap(ChainedOptimizer.prepare_grads), chain)
    for optimizer in optimizers:
        optimizer.config.clip_grad = 0.0  # else the factor below would hold the clipping too
        scaler = optimizer.grad_scaler
        scaler._scale.fill_(plan.scale)
        scaler.growth_interval, scaler.hysteresis, scaler._hysteresis_tracker = (
            plan.growth_interval,
            1,
            1,
        )
    return [_step(training, optimizers, step, plan) for step in range(plan.job.steps)]


def _step(training: Training, optimizers: list, step: int, plan: Plan) -> StepSeen:
    losses = training.forward_backward()
    named = [p for chunk in training.ddp for p in chunk.named_parameters()]
    weights = [p.detach().clone() for _, p in named]
    expert = next(p for n, p in named if "experts" in n)
    if step in plan.spoilt:
        target = next(p for n, p in named if plan.where in n)
        target.main_grad.view(-1)[0] = torch.inf
    scales = [float(o.get_loss_scale()) for o in optimizers]
    found = expert.main_grad.detach().clone()
    stepped, *_ = training.optimizer.step()
    return StepSeen(
        scales=scales,
        stepped=stepped,
        unchanged=all(torch.equal(w, p) for w, (_, p) in zip(weights, named, strict=True)),
        finite=all(bool(p.isfinite().all()) for _, p in named),
        expert_factor=_factor(expert, found, scales[0]),
        loss=losses[0][0],
    )


def _factor(expert: Any, scaled: Tensor, scale: float) -> float:
    """Of the gradient handed to the inner optimizer, by norms."""
    return float(expert.main_param.grad.norm() / (scaled.float().norm() / scale))
