"""What the runs say, in sentences made of their figures, also where an idea does not help."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.tools.study.compare import Estimate, Study
from megatron_moe.tools.study.plan import Plan
from megatron_moe.tools.study.variants import BASELINE, VARIANTS

# By this much a balancing loss reduces the variance of load, says the literature.
CLAIMED_CUT = 0.65
_EQUAL_WORK = 0.02


@dataclass(frozen=True)
class Finding:
    """A heading with its sentences."""

    heading: str
    lines: tuple[str, ...]


def findings(study: Study, plan: Plan) -> list[Finding]:
    """Everything that can be said of the variants that were run."""
    parts = [
        Finding("By how much balancing cuts the variance of load", _balance(study, plan)),
        Finding("Churn and loss, with and without each stability measure", _stability(study)),
        Finding("Choice of experts at equal arithmetic a token", _choices(study, plan)),
        Finding("Capacity", _capacity(study)),
        Finding("Options that changed nothing", _same(study)),
        Finding("What helped the loss, and what did not", _verdicts(study, plan)),
    ]
    return [part for part in parts if part.lines]


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


def _balance(study: Study, plan: Plan) -> tuple[str, ...]:
    lines = []
    for name in study.names:
        control = VARIANTS[name].unbalanced
        if not control or not study.has(control):
            continue
        cut = study.cut(name, control)
        before, after = (study.measured(n, "variance").mean for n in (control, name))
        loss = study.difference(name, control, "loss")
        line = (
            f"{name}: {plain(cut, 1, 100)} % less variance than {control} "
            f"({before:.4f} → {after:.4f}); loss {signed(loss)}: {loss_verdict(loss)}"
        )
        if name == BASELINE:
            line += f". Claimed in the literature: {CLAIMED_CUT:.0%}, {_held(cut)}"
        lines.append(line)
    if lines:
        floor = plan.chance_variance
        lines.append(
            f"Choices by pure chance would leave a variance of {floor:.4f} (a coefficient of "
            f"variation of {floor**0.5:.3f}) in steps of {plan.tokens_per_step} tokens; to cut "
            "below that takes balancing within the step"
        )
    return tuple(lines)


def _held(cut: Estimate) -> str:
    """Say how a measured cut stands to the claimed one."""
    low, high = cut.mean - (cut.half or 0.0), cut.mean + (cut.half or 0.0)
    if low > CLAIMED_CUT:
        return "and here it is more"
    if high < CLAIMED_CUT:
        return "and here it is less"
    return "which these runs agree with"


def _stability(study: Study) -> tuple[str, ...]:
    lines = []
    for name in _family(study, "stability"):
        against = VARIANTS[name].against
        loss = study.difference(name, against, "loss")
        without, with_it = (study.measured(n, "loss").mean for n in (against, name))
        probe, context = (_churned(study, name, m) for m in ("churn", "context_churn"))
        lines.append(
            f"{name}: churn on the probe {probe}; of training in repeated contexts {context}; "
            f"loss {without:.4f} without, {with_it:.4f} with ({signed(loss)}: {loss_verdict(loss)})"
        )
    return tuple(lines)


def _churned(study: Study, name: str, measure: str) -> str:
    """``20.0% without, 10.0% with (-10.0 ± 1.0 points: calmer)``."""
    against = VARIANTS[name].against
    before, after = (study.measured(n, measure).mean for n in (against, name))
    moved = study.difference(name, against, measure)
    told = {-1: "calmer", 0: "not told from noise", 1: "more restless"}[moved.sign]
    told = "one seed" if moved.half is None else told
    return f"{before:.1%} without, {after:.1%} with ({signed(moved, 1, 100)} points: {told})"


def _choices(study: Study, plan: Plan) -> tuple[str, ...]:
    names = [n for n in _family(study, "choice") if n != BASELINE]
    fair = [n for n in names if not VARIANTS[n].leaks]
    fair.sort(key=lambda name: study.difference(name, BASELINE, "loss").mean)
    lines = []
    for name in fair:
        loss = study.difference(name, BASELINE, "loss")
        cv, k = study.measured(name, "cv").mean, study.measured(name, "mean_k").mean
        line = (
            f"{name}: loss {signed(loss)} against {BASELINE}: {loss_verdict(loss)}; "
            f"load cv {cv:.3f}, {k:.3f} experts a token"
        )
        share = study.work(name, plan)
        if abs(share - 1) > _EQUAL_WORK:
            line += f", so {share:.2f} of the arithmetic"
        lines.append(line)
    for name in (n for n in names if VARIANTS[n].leaks):
        loss = study.difference(name, BASELINE, "loss")
        lines.append(
            f"{name}: loss {signed(loss)}, which compares with none of the others: which tokens "
            "an expert takes depends on tokens that are yet to be predicted"
        )
    return tuple(lines)


def _capacity(study: Study) -> tuple[str, ...]:
    lines = []
    for name in _family(study, "capacity"):
        loss = study.difference(name, VARIANTS[name].against, "loss")
        dropped = study.measured(name, "drop_rate")
        lines.append(
            f"{name}: {plain(dropped, 1, 100)} % of the choices dropped; loss {signed(loss)} "
            f"against dropless: {loss_verdict(loss)}"
        )
    return tuple(lines)


def _verdicts(study: Study, plan: Plan) -> tuple[str, ...]:
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
        against = VARIANTS[name].against
        if not VARIANTS[name].leaks and against != name:
            side = study.difference(name, against, "loss").sign
            sorted_by.setdefault((side, against), []).append(name)
    lines = [
        f"{words[side]} {against}: {', '.join(names)}"
        for (side, against), names in sorted(sorted_by.items(), key=lambda item: item[0][0])
    ]
    spread = study.measured(BASELINE, "loss").half if study.has(BASELINE) else None
    if spread is not None:
        lines.append(
            f"The loss of {BASELINE} itself is known to ± {spread:.4f} from {plan.seeds} seeds; "
            "differences are taken seed by seed, from equal weights on equal text, and intervals "
            "are of 95 %, each for itself: of twenty, one misses by chance"
        )
    return tuple(lines)


def _same(study: Study) -> tuple[str, ...]:
    """Variants whose runs agree to the last digit: options that changed nothing."""
    seen: dict[tuple, str] = {}
    lines = []
    for name in study.names:
        points = tuple(run.points for run in study.of(name))
        if points in seen:
            lines.append(f"{name} made exactly the runs of {seen[points]}")
        seen.setdefault(points, name)
    return tuple(lines)


def _family(study: Study, family: str) -> list[str]:
    return [name for name in study.names if VARIANTS[name].family == family]
