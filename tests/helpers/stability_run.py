"""Train a few steps and look at the weights after each; runs in the workers."""

from dataclasses import dataclass
from typing import Any

import torch
from helpers.layout import Layout
from helpers.runs import Job, Means
from torch import Tensor


@dataclass(frozen=True)
class Steps:
    """What one rank saw.

    Args:
        weights: After 0, 1, 2 … steps, by name.
        churn: Of each layer's probe after each step.
        logged: What Megatron's log says of each step.
        buffers: The routers' buffers after the last step, by layer and key.
        learned: Adam's step counts after the last step, of each parameter.
    """

    weights: list[dict[str, Tensor]]
    churn: list[list[float | None]]
    logged: list[dict[str, float]]
    buffers: list[dict[str, Tensor]]
    learned: set[float]


def train_steps(
    world: Any,
    job: Job,
    means: Means,
    start: dict[str, Tensor] | None = None,
    buffers: list[dict[str, Tensor]] | None = None,
) -> Steps:
    """Train ``job.steps`` steps.

    Args:
        world: The pool's.
        job: What is trained.
        means: How.
        start: Weights to start from, as :class:`Steps` has them.
        buffers: Buffers of the routers to start from.
    """
    from helpers.training_run import Training

    from megatron_moe.mcore.token_ids import feed_token_ids
    from megatron_moe.telemetry.counters import routers_of

    training = Training(job, means)
    routers = routers_of(training.ddp)
    for chunk in training.chunks:
        feed_token_ids(chunk)
    with torch.no_grad():
        for name, value in (start or {}).items():
            dict(_parameters(training))[name].copy_(value)
        for router, state in zip(routers, buffers or [], strict=False):
            saved = dict(router.state_dict()) | state
            router.load_state_dict(saved)
    seen, churn, logged = [_snapshot(training)], [], []
    for _ in range(job.steps):
        training.forward_backward()
        training.update()
        training.gather_weights()
        seen.append(_snapshot(training))
        churn.append([router.churn for router in routers])
        logged.append(training.logged())
    own = [{k: v.clone() for k, v in r._buffers.items() if v is not None} for r in routers]
    return Steps(seen, churn, logged, own, _step_counts(training.optimizer))


def is_router(name: str) -> bool:
    return ".router." in name


def layout_of(**sizes: int) -> Layout:
    return Layout(**sizes)


def _parameters(training: Any) -> Any:
    for chunk in training.chunks:
        yield from chunk.named_parameters()


def _snapshot(training: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in _parameters(training)}


def _step_counts(optimizer: Any) -> set[float]:
    inner = getattr(optimizer, "chained_optimizers", [optimizer])
    states = [s for o in inner for s in o.optimizer.state.values()]
    return {float(s["step"]) for s in states if "step" in s}
