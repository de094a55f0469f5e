"""Runs to estimates: the mean over seeds, and how far it may be off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan
from statistics import fmean, stdev

from megatron_moe.tools.study.history import Run
from megatron_moe.tools.study.plan import Plan
from megatron_moe.tools.study.subject import Subject

# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: The mean.
        half: Half of the width of its 95 % interval (Student's t); None with one seed.
    """

    mean: float
    half: float | None

    @property
    def sign(self) -> int:
        """Which side of zero it is on: -1 or 1; 0 when the seeds do not tell."""
        if self.half is None or not abs(self.mean) > self.half:  # nor is a missing value
            return 0
        return 1 if self.mean > 0 else -1

    def columns(self, name: str) -> dict[str, float | None]:
        """Two columns of a table: the mean, and the half of the interval."""
        return {name: self.mean, f"{name}_half": self.half}


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate the mean that ``values``, one a seed, are drawn around."""
    if len(values) == 1:
        return Estimate(values[0], None)
    if any(map(isnan, values)):
        return Estimate(nan, nan)
    t = _T95[min(len(values) - 1, len(_T95)) - 1]
    return Estimate(fmean(values), t * stdev(values) / len(values) ** 0.5)


def outcome(run: Run, measures: Sequence[str]) -> dict[str, float]:
    """What a run comes to: the last validation loss, all else in the mean of its second half.

    What was never measured (churn in a run too short for it) is not a number.

    Args:
        run: The run.
        measures: Fields of it, or of its points.
    """
    found: dict[str, float] = {}
    for name in measures:
        if name == "loss" or hasattr(run, name):
            found[name] = getattr(run.points[-1] if name == "loss" else run, name)
            continue
        values = [v for p in run.late() if (v := getattr(p, name)) is not None]
        found[name] = fmean(values) if values else nan
    return found


class Study:
    """All runs, by variant and seed.

    Args:
        runs: In any order.
        subject: What they are compared in.
    """

    def __init__(self, runs: Sequence[Run], subject: Subject) -> None:
        self.subject, self.variants = subject, subject.variants
        order = list(self.variants)
        self.runs = sorted(runs, key=lambda run: (order.index(run.variant), run.seed))
        self.names = list(dict.fromkeys(run.variant for run in self.runs))
        self.outcomes = {(r.variant, r.seed): outcome(r, subject.measures) for r in self.runs}

    def of(self, variant: str) -> list[Run]:
        """Return the runs of a variant, by seed."""
        return [run for run in self.runs if run.variant == variant]

    def has(self, *variants: str) -> bool:
        """Whether all of them were run."""
        return all(variant in self.names for variant in variants)

    def measured(self, variant: str, measure: str) -> Estimate:
        """Estimate one of the subject's measures."""
        return estimate([self.outcomes[variant, run.seed][measure] for run in self.of(variant)])

    def difference(self, variant: str, against: str, measure: str) -> Estimate:
        """Estimate ``variant`` minus ``against``, seed by seed: both began from the same."""
        return estimate([a - b for a, b in self._pairs(variant, against, measure)])

    def cut(self, variant: str, against: str, measure: str = "variance") -> Estimate:
        """By what share ``variant`` is below ``against``, seed by seed; 1 is all of it."""
        change = self.change(variant, against, measure)
        return Estimate(-change.mean, change.half)

    def change(self, variant: str, against: str, measure: str) -> Estimate:
        """By what share ``variant`` is above ``against``, seed by seed; 1 is twice as much."""
        pairs = self._pairs(variant, against, measure)
        return estimate([a / b - 1 if b else nan for a, b in pairs])

    def work(self, variant: str, plan: Plan) -> float:
        """Arithmetic in experts that a token meets, over that of ``plan``'s top-k."""
        k, dropped = (self.measured(variant, m).mean for m in ("mean_k", "drop_rate"))
        return k * (1 - dropped) * self.variants[variant].widen / plan.topk

    def _pairs(self, variant: str, against: str, measure: str) -> list[tuple[float, float]]:
        seeds = [run.seed for run in self.of(variant)]
        return [
            (self.outcomes[variant, s][measure], self.outcomes[against, s][measure]) for s in seeds
        ]
