"""The routing study: ways to choose experts, to balance them, to drop tokens, to keep still."""

from __future__ import annotations

from megatron_moe.tools.study.compare import Estimate, Study
from megatron_moe.tools.study.findings import (
    Finding,
    family,
    loss_verdict,
    plain,
    same_runs,
    signed,
    verdicts,
)
from megatron_moe.tools.study.plan import Plan
from megatron_moe.tools.study.subject import CONTROL, Column, Panel, Subject, mean_column
from megatron_moe.tools.study.variants import BASELINE, VARIANTS

# By this much a balancing loss reduces the variance of load, says the literature.
CLAIMED_CUT = 0.65
_EQUAL_WORK = 0.02

FULL = Plan()
QUICK = Plan(
    steps=200,
    seeds=1,
    measurements=10,
    chosen=(
        "topk",
        "switch",
        "expert-choice",
        "sinkhorn",
        "hash",
        "top-p",
        "none",
        "kl",
        "sigmoid-none",
        "bias-sign",
        "capacity-probs",
        "capacity-position",
        "hysteresis",
        "pretrain",
        "freeze",
        "noise",
    ),
)

_PANELS = (
    Panel("loss", "validation loss"),
    Panel("loss", "… minus that of its control", compared=CONTROL),
    Panel("cv", "load: coefficient of variation"),
    Panel("entropy", "load: entropy (1 = even)"),
    Panel("drop_rate", "choices dropped", percent=True),
    Panel("churn", "churn on a fixed probe", percent=True),
    Panel("context_churn", "churn in training, same context", percent=True),
    Panel("mean_k", "experts a token"),
)


def findings(study: Study, plan: Plan) -> list[Finding]:
    """Everything that can be said of the variants that were run."""
    parts = [
        Finding("By how much balancing cuts the variance of load", _balance(study, plan)),
        Finding("Churn and loss, with and without each stability measure", _stability(study)),
        Finding("Choice of experts at equal arithmetic a token", _choices(study, plan)),
        Finding("Capacity", _capacity(study)),
        Finding("Options that changed nothing", same_runs(study)),
        Finding("What helped the loss, and what did not", verdicts(study, plan)),
    ]
    return [part for part in parts if part.lines]


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
    for name in family(study, "stability"):
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
    names = [n for n in family(study, "choice") if n != BASELINE]
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
    for name in family(study, "capacity"):
        loss = study.difference(name, VARIANTS[name].against, "loss")
        dropped = study.measured(name, "drop_rate")
        lines.append(
            f"{name}: {plain(dropped, 1, 100)} % of the choices dropped; loss {signed(loss)} "
            f"against dropless: {loss_verdict(loss)}"
        )
    return tuple(lines)


def _loss(study: Study, _plan: Plan, name: str) -> str:
    mark = "*" if VARIANTS[name].leaks else ""
    return f"{study.measured(name, 'loss').mean:.4f}{mark}"


def _difference(study: Study, _plan: Plan, name: str) -> str:
    against = VARIANTS[name].against
    if against == name or not study.has(against):
        return ""
    return signed(study.difference(name, against, "loss"))


def _work(study: Study, plan: Plan, name: str) -> dict[str, float | None]:
    return {"work": study.work(name, plan)}


ROUTING = Subject(
    name="routing_study",
    says="Compare ways to route: one small GPT, one text, equal arithmetic a token, on this CPU.",
    noun="routers",
    variants=VARIANTS,
    full=FULL,
    quick=QUICK,
    quick_says="Fewer variants and steps, one seed: about 3 minutes.",
    measures=(
        "loss",
        "cv",
        "variance",
        "entropy",
        "drop_rate",
        "churn",
        "context_churn",
        "mean_k",
    ),
    columns=(
        Column("loss", _loss),
        Column("difference", _difference),
        mean_column("load cv", "cv", "{:.3f}"),
        mean_column("entropy", "entropy", "{:.4f}"),
        mean_column("drops", "drop_rate", "{:.1%}"),
        mean_column("churn", "churn", "{:.1%}"),
        mean_column("in context", "context_churn", "{:.1%}"),
        mean_column("mean k", "mean_k", "{:.3f}"),
        Column("work", lambda study, plan, name: f"{study.work(name, plan):.2f}"),
    ),
    caption=(
        "loss: validation, at the end; difference: from the variant it is compared with; the rest "
        "in the mean of the run's second half; churn: choices changed between two measurements, on "
        "a fixed probe; in context: in training, since the same four tokens were read; work: "
        "arithmetic in experts over the baseline's"
    ),
    further=_work,
    panels=_PANELS,
    findings=findings,
)
