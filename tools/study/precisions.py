"""The precision study: what fewer bits, or fewer weights, do to the loss; FP8 by emulation.

Weights and activations of the whole model in fp32, bf16 or fp16; FP8 in the experts alone, on top
of bf16; 2:4 sparse experts in fp32. What is claimed is about numbers: a CPU that imitates FP8 says
nothing of how fast FP8 is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
from megatron_moe.tools.study.subject import Column, Panel, Subject, mean_column
from megatron_moe.tools.study.variants import Variant

BASELINE, HALF = "fp32", "bf16"
_HALF, _EIGHT, _FEWER = "half precision", "FP8 experts, bf16", "2:4 experts, fp32"
WANTED = 0.02  # FP8 should change the loss of bf16 by no more than this share


def _fp8(recipe: str, says: str, form: str = "recipe") -> Variant:
    name = f"fp8-{recipe}" if form == "recipe" else f"fp8-{recipe}-{form}"
    moe = {"fp8_emulate": recipe, "fp8_emulate_format": form}
    return Variant(name=name, family=_EIGHT, says=says, against=HALF, moe=moe, precision=HALF)


def _sparse(
    name: str,
    says: str,
    against: str = BASELINE,
    schedule: dict[str, float] | None = None,
    **moe: Any,
) -> Variant:
    options = {"sparse_experts": "2:4"} | moe
    return Variant(
        name=name, family=_FEWER, says=says, against=against, moe=options, schedule=schedule or {}
    )


_ALL = (
    Variant(name=BASELINE, family=_HALF, says="all in fp32", against=BASELINE),
    Variant(name=HALF, family=_HALF, says="bf16, with fp32 copies and gradients",
            against=BASELINE, precision=HALF),
    Variant(name="fp16", family=_HALF, says="fp16, the same, dynamic loss scale",
            against=BASELINE, precision="fp16"),
    _fp8("tensorwise", "a scale a tensor"),
    _fp8("tensorwise", "a scale a tensor, gradients in e4m3 too", "e4m3"),
    _fp8("delayed", "a scale a tensor, of the last batch"),
    _fp8("blockwise", "a scale a block of 128"),
    _fp8("mxfp8", "a scale 32 numbers"),
    _sparse("sparse", "two of four from the start"),
    _sparse("sparse-late", "from half of the run, frozen at 3/4",
            schedule={"sparse_start_iter": 0.5, "sparse_freeze_iter": 0.75}),
    _sparse("sparse-no-decay", "from the start, no decay of the rest", "sparse", sparse_decay=0.0),
)  # fmt: skip
PRECISIONS = {variant.name: variant for variant in _ALL}

# Wide enough for more than one block of 128 along what is contracted in the second layer.
_SIZES = Plan(hidden=128, expert_ffn=256)
FULL = replace(_SIZES, steps=160, measurements=10)
QUICK = replace(
    _SIZES,
    steps=60,
    seeds=1,
    measurements=6,
    chosen=("fp32", "bf16", "fp16", "fp8-delayed", "fp8-blockwise", "fp8-mxfp8", "sparse"),
)


def findings(study: Study, plan: Plan) -> list[Finding]:
    """Everything that can be said of the precisions that were run."""
    parts = [
        Finding("Half precision", _half(study, plan)),
        Finding("FP8 in the experts, emulated", _eight(study)),
        Finding("2:4 sparse experts", _fewer(study)),
        Finding("Memory", _memory(study)),
        Finding("What imitating costs on this processor; not how fast it is", _cost(study)),
        Finding("Options that changed nothing", same_runs(study)),
        Finding("What helped the loss, and what did not", verdicts(study, plan)),
    ]
    return [part for part in parts if part.lines]


def _told(study: Study, name: str, against: str) -> str:
    """``loss +0.12 ± 0.30 % against bf16: not told from noise``."""
    change = study.change(name, against, "loss")
    return f"loss {signed(change, 2, 100)} % against {against}: {loss_verdict(change)}"


def _half(study: Study, plan: Plan) -> tuple[str, ...]:
    lines = []
    for name in (n for n in family(study, _HALF) if n != BASELINE):
        line = f"{name}: {_told(study, name, BASELINE)}"
        if PRECISIONS[name].precision == "fp16":
            skipped = study.measured(name, "skipped").mean
            line += f"; of {plan.steps} updates {skipped:.1f} skipped for what fp16 cannot hold"
        lines.append(line)
    return tuple(lines)


def _eight(study: Study) -> tuple[str, ...]:
    names = family(study, _EIGHT)
    if not names:
        return ()
    lines = [
        f"{name}: {_told(study, name, HALF)}; {_told(study, name, BASELINE)}" for name in names
    ]
    far = {name: _furthest(study.change(name, HALF, "loss")) for name in names}
    worst = max(names, key=lambda name: far[name])
    line = f"Furthest from {HALF}: {worst}, by "
    if study.change(worst, HALF, "loss").half is None:
        line += f"{far[worst]:.2%} with this one seed"
    else:
        within = "all stay" if far[worst] <= WANTED else "not all are shown to stay"
        line += f"at most {far[worst]:.2%}, its interval counted, so {within} within {WANTED:.0%}"
    return (*lines, line)


def _furthest(e: Estimate) -> float:
    return abs(e.mean) + (e.half or 0.0)


def _fewer(study: Study) -> tuple[str, ...]:
    lines = []
    for name in family(study, _FEWER):
        against = dict.fromkeys((BASELINE, PRECISIONS[name].against))
        lines.append(f"{name}: " + "; ".join(_told(study, name, other) for other in against))
    return tuple(lines)


def _memory(study: Study) -> tuple[str, ...]:
    alike: dict[str, list[str]] = {}
    for name in study.names:
        told = (
            f"{study.measured(name, 'state_bytes').mean:.2f} bytes a parameter stay; one MoE layer "
            f"keeps {_kib(study, name):.0f} KiB for the backward pass of a micro-batch"
        )
        alike.setdefault(told, []).append(name)
    lines = [f"{', '.join(names)}: {told}" for told, names in alike.items()]
    lines.append(
        "What stays are weights, masks, gradients (fp32), and the optimizer's fp32 copies and two "
        "moments. The emulation keeps what is multiplied as it was before rounding, where FP8 "
        "hardware keeps it in FP8; sparse experts keep their masked weights too"
    )
    return tuple(lines)


def _cost(study: Study) -> tuple[str, ...]:
    if not study.has(BASELINE):
        return ()
    ratios = (f"{name} {_ratio(study, name):.2f}" for name in study.names if name != BASELINE)
    return (f"CPU time of a run over that of {BASELINE}: " + ", ".join(ratios),)


def _ratio(study: Study, name: str) -> float:
    return 1 + study.change(name, BASELINE, "cpu_seconds").mean


def _kib(study: Study, name: str) -> float:
    return study.measured(name, "held_bytes").mean / 1024


def _percent_of(against: str) -> Column:
    def cell(study: Study, _plan: Plan, name: str) -> str:
        if name == against or not study.has(against):
            return ""
        return signed(study.change(name, against, "loss"), 2, 100)

    return Column(f"% over {against}", cell)


def _further(study: Study, _plan: Plan, name: str) -> dict[str, float | None]:
    columns: dict[str, float | None] = {}
    for against in (BASELINE, HALF):
        if study.has(against):
            columns |= study.change(name, against, "loss").columns(f"loss_change_from_{against}")
    return columns | {"cpu_time_ratio": _ratio(study, name)}


PRECISION = Subject(
    name="precision_study",
    says="Compare precisions: one small GPT, one text, FP8 emulated, on this CPU.",
    noun="precisions",
    variants=PRECISIONS,
    full=FULL,
    quick=QUICK,
    quick_says="Fewer variants and steps, one seed: under 2 minutes on two idle cores.",
    measures=("loss", "skipped", "cpu_seconds", "state_bytes", "held_bytes"),
    columns=(
        Column("loss", lambda study, _plan, name: plain(study.measured(name, "loss"))),
        _percent_of(BASELINE),
        _percent_of(HALF),
        mean_column("skipped", "skipped", "{:.1f}"),
        mean_column("bytes/param", "state_bytes", "{:.2f}"),
        Column("held KiB", lambda study, _plan, name: f"{_kib(study, name):.0f}"),
        Column("CPU time", lambda study, _plan, name: f"{_ratio(study, name):.2f}"),
    ),
    caption=(
        "loss: validation, at the end; % over: how far it is above, seed by seed; skipped: updates "
        "that the loss scaler skipped; bytes/param: weights, masks, gradients, optimizer; held: by "
        "one MoE layer for the backward pass of a micro-batch; CPU time: over that of fp32, what "
        "imitating costs here, which says nothing of the speed of FP8 or half precision on a GPU"
    ),
    further=_further,
    panels=(
        Panel("loss", "validation loss"),
        Panel("loss", f"… against that of {BASELINE}", percent=True, compared=BASELINE),
        Panel("loss", f"… against that of {HALF}", percent=True, compared=HALF),
    ),
    findings=findings,
)
