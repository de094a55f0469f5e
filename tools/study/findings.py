"""Sentences made of figures: what every study says in the same words."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.tools.study.compare import Estimate, Study
from megatron_moe.tools.study.plan import Plan


@dataclass(frozen=True)
class Finding:
    """A heading with its sentences."""

    heading: str
    lines: tuple[str, ...]


def signed(e: Estimate, digits: int = 4, scale: float = 1.0) -> str:
    """``+0.0123 ± 0.0040``; with one seed the mean alone."""
    mean = f"{e.mean * scale:+.{digits}f}"
    return mean if e.half is None else f"{mean} ± {e.half * scale:.{digits}f}"


def plain(e: Estimate, digits: int = 4, scale: float = 1.0) -> str:
    """``0.0123 ± 0.0040``, for what has no direction."""
    return signed(e, digits, scale).removeprefix("+")


def loss_verdict(e: Estimate) -> str:
    """Say which side a difference of losses is on, if the seeds tell."""
    if e.half is None:
        return "one seed cannot tell it from noise"
    return {-1: "better", 0: "not told from noise", 1: "worse"}[e.sign]


def verdicts(study: Study, plan: Plan) -> tuple[str, ...]:
    """Sort what was tried by what it did to the loss."""
    if plan.seeds == 1:
        return ("One seed: no difference above can be told from noise. More seeds (--seeds 3) can",)
    words = {
        -1: "Better than",
        0: "No difference that the seeds can tell from",
        1: "Worse than",
    }
    sorted_by: dict[tuple[int, str], list[str]] = {}
    for name in study.names:
        against = study.variants[name].against
        if not study.variants[name].leaks and against != name:
            side = study.difference(name, against, "loss").sign
            sorted_by.setdefault((side, against), []).append(name)
    lines = [
        f"{words[side]} {against}: {', '.join(names)}"
        for (side, against), names in sorted(sorted_by.items(), key=lambda item: item[0][0])
    ]
    baseline = study.subject.baseline
    spread = study.measured(baseline, "loss").half if study.has(baseline) else None
    if spread is not None:
        lines.append(
            f"The loss of {baseline} itself is known to ± {spread:.4f} from {plan.seeds} seeds; "
            "differences are taken seed by seed, from equal weights on equal text, and intervals "
            "are of 95 %, each for itself: of twenty, one misses by chance"
        )
    return tuple(lines)


def same_runs(study: Study) -> tuple[str, ...]:
    """Variants whose runs agree to the last digit: options that changed nothing."""
    seen: dict[tuple, str] = {}
    lines = []
    for name in study.names:
        points = tuple(run.points for run in study.of(name))
        if points in seen:
            lines.append(f"{name} made exactly the runs of {seen[points]}")
        seen.setdefault(points, name)
    return tuple(lines)


def family(study: Study, wanted: str) -> list[str]:
    """Names of a family's variants that were run."""
    return [name for name in study.names if study.variants[name].family == wanted]
