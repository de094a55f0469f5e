"""What a run leaves behind: plain numbers, the same in memory, between processes and in JSON."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement, of the steps since the one before, in the mean over layers and steps.

    Args:
        step: Updates done.
        loss: Mean cross entropy on the validation set, nats.
        cv: Standard deviation of a step's load over its mean, over experts.
        variance: The same squared: variance of the load relative to an even share.
        entropy: Entropy of a step's load over its largest value; 1 is even.
        drop_rate: Share of the choices that capacity gave up.
        mean_k: Choices a token.
        churn: Share of the validation tokens' choices that differ from the measurement before;
            None at the first.
        context_churn: Share of training's choices that differ from those last made where the same
            four tokens were read; None without a repetition.
    """

    step: int
    loss: float
    cv: float
    variance: float
    entropy: float
    drop_rate: float
    mean_k: float
    churn: float | None
    context_churn: float | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One variant with one seed.

    Args:
        variant: Its name.
        seed: Of weights, order of the text, and whatever the router draws.
        points: Measurements in order.
        seconds: Wall time.
        cpu_seconds: Time of the processor for the same.
        skipped: Updates that were skipped because a gradient was not finite.
        state_bytes: Bytes a parameter: weights, masks, gradients, what the optimizer keeps.
        held_bytes: What one MoE layer keeps for the backward pass of one micro-batch.
    """

    variant: str
    seed: int
    points: tuple[Point, ...]
    seconds: float
    cpu_seconds: float
    skipped: int
    state_bytes: float
    held_bytes: int

    def late(self) -> tuple[Point, ...]:
        """Return the measurements of the run's second half."""
        return self.points[len(self.points) // 2 :]
