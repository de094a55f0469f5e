"""The picture: a row for each family of variants, a panel for each measure over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_moe.tools.study.compare import Study
from megatron_moe.tools.study.files import written_whole
from megatron_moe.tools.study.plan import Plan
from megatron_moe.tools.study.subject import CONTROL, Panel

_BASELINE_COLOUR = "#111111"
_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00",
    "#56b4e9", "#7f3c8d", "#8c564b", "#6b8e23", "#888888",
)  # fmt: skip
_LOOKS = [(style, colour) for style in ("-", "--") for colour in _COLOURS]
_NOT_SHOWN = 0.2  # of a run: the first fall of the loss would flatten everything after it


def draw(study: Study, plan: Plan, targets: Sequence[Path]) -> None:
    """Draw into every target, by its ending (``.png``, ``.svg``).

    Args:
        study: The runs.
        plan: Sizes.
        targets: Files, each written whole or not at all.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    subject = study.subject
    rows = [(family, subject.row_of(family, study.names)) for family in subject.families]
    rows = [(family, names) for family, names in rows if names]
    shown = [p for p in subject.panels if p.compared in ("", CONTROL) or study.has(p.compared)]
    # Text stays text in SVG: smaller, and it can be searched.
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "study"}
    style |= {"font.size": 8, "font.sans-serif": ["DejaVu Sans"], "ytick.major.size": 0}
    with rc_context(style):
        size = _size(len(rows), len(shown))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(rows), len(shown), squeeze=False, sharex=True)
        for (family, names), row in zip(rows, axes, strict=True):
            _draw_row(study, plan, names, shown, row)
            row[0].set_ylabel(family, fontsize=11, fontweight="bold")
        for panel, ax in zip(shown, axes[0], strict=True):
            ax.set_title(panel.title, fontsize=10)
        for ax in axes[-1]:
            ax.set_xlabel("step")
        figure.suptitle(_heading(plan), fontsize=10, x=0.01, ha="left")
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # each further drawing would move things a little
        for target in targets:
            with written_whole(target) as temporary:
                # No date: the same runs give the same file.
                metadata = {"Date": None} if target.suffix == ".svg" else {}
                figure.savefig(temporary, dpi=110, metadata=metadata)


def _size(rows: int, columns: int) -> tuple[float, float]:
    """Width and height in inches; a few panels are drawn larger than many."""
    width = 2.75 * columns if columns > 4 else 2 + 4.5 * columns
    return width, 0.9 + 2.5 * rows


def _heading(plan: Plan) -> str:
    seeds = "one seed" if plan.seeds == 1 else f"mean of {plan.seeds} seeds, band: their range"
    return (
        f"GPT of {plan.layers} layers, width {plan.hidden}, {plan.experts} experts, "
        f"{plan.topk} a token; {plan.tokens_per_step} tokens a step of Python's standard library; "
        f"{seeds}"
    )


def _draw_row(
    study: Study, plan: Plan, names: list[str], shown: Sequence[Panel], axes: Any
) -> None:
    baseline = study.subject.baseline
    looks = dict(zip([n for n in names if n != baseline], _LOOKS, strict=False))
    band = min(0.12, 0.5 / len(names))  # of many bands on each other nothing would be seen
    for panel, ax in zip(shown, axes, strict=True):
        for place, name in enumerate(names):
            leaks = study.variants[name].leaks
            if panel.compared and leaks:
                continue
            steps, mean, low, high = over_time(study, name, panel)
            style, colour = looks.get(name, ("-", _BASELINE_COLOUR))
            style = ":" if leaks else style
            order = len(names) if name == baseline else place
            ax.plot(steps, mean, style, color=colour, lw=1.2, label=name, zorder=2 + order)
            if plan.seeds > 1:
                ax.fill_between(steps, low, high, color=colour, alpha=band, lw=0)
        _scale(ax, panel, plan)
        if panel.measure == "cv":
            ax.axhline(plan.chance_variance**0.5, color="#999999", lw=0.8, ls=":", zorder=1)
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)


def _scale(ax: Any, panel: Panel, plan: Plan) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    ax.grid(color="#e5e5e5", lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlim(0, plan.steps)
    if panel.measure == "loss":
        if not panel.percent:  # else bands and all: how wide they are is what such a panel shows
            ax.set_ylim(_range_of_late(ax, plan.steps * _NOT_SHOWN))
    elif panel.measure == "mean_k":
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, plan.topk - 0.25), max(high, plan.topk + 0.25))
    elif panel.measure != "entropy":
        ax.set_ylim(0, max(ax.get_ylim()[1], 0.01))
    if panel.percent:
        decimals = 2 if panel.compared else 0
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=decimals))


def _range_of_late(ax: Any, first: float) -> tuple[float, float]:
    """What the lines reach from step ``first`` on, with a margin."""
    seen = [
        y
        for line in ax.lines
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
        if x >= first
    ]
    margin = 0.04 * (max(seen) - min(seen)) or 0.01
    return min(seen) - margin, max(seen) + margin


def over_time(
    study: Study, name: str, panel: Panel
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps, and the mean, least and largest of a measure over seeds; without missing ones."""
    against = study.variants[name].against if panel.compared == CONTROL else panel.compared
    found = []
    for i, point in enumerate(study.of(name)[0].points):
        values = [getattr(run.points[i], panel.measure) for run in study.of(name)]
        if None in values:
            continue
        if panel.compared:
            theirs = (getattr(run.points[i], panel.measure) for run in study.of(against))
            pairs = zip(values, theirs, strict=True)
            values = [a / b - 1 if panel.percent else a - b for a, b in pairs]
        found.append((point.step, fmean(values), min(values), max(values)))
    return (
        [f[0] for f in found],
        [f[1] for f in found],
        [f[2] for f in found],
        [f[3] for f in found],
    )
