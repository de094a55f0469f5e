"""The tables of the experts benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.table import Table

from megatron_moe.experts.form_table import DEFAULT, Fastest
from megatron_moe.tools.bench.experts_case import LIMIT, SIDES, TE, UPSTREAM
from megatron_moe.tools.bench.form_choice import NOISE, least_gain

Case = dict[str, Any]


def stage_table(processes: Sequence[Sequence[Case]], dtype: str) -> Table:
    """Every back end beside upstream's experts, a row for each shape and workload.

    Args:
        processes: The cases of each process; shown are medians over processes.
        dtype: Of the cases to show.
    """
    missing = processes[0][0]["missing"]
    others = [side for side in (*SIDES, TE) if side != UPSTREAM and side not in missing]
    table = _table(
        f"experts alone, forward + backward, {dtype}: speed relative to upstream's", "shape",
        "workload", "rows", "upstream ms", "limit ms", *others, "auto is", "of limit", "difference",
    )  # fmt: skip
    table.caption = "\n".join(f"{side}: not measured, {why}" for side, why in missing.items())
    table.caption_justify = "left"
    before = ""
    for same in zip(*processes, strict=True):
        case = same[0]
        if case["dtype"] != dtype:
            continue
        ms = {side: median(c["seconds"][side] for c in same) * 1e3 for side in (UPSTREAM, LIMIT)}
        low, _, high = case["rows"]
        name, before = "" if case["shape"] == before else case["shape"], case["shape"]
        table.add_row(
            name,
            case["workload"],
            f"{low}" if low == high else f"{low}–{high}",
            *(f"{value:.1f}" for value in ms.values()),
            *(_ratios(same, side) for side in others),
            case["auto"],
            f"{median(c['seconds'][LIMIT] / c['seconds']['auto'] for c in same):.2f}",
            f"{max(max(c['differences'].values()) for c in same):.0e}",
        )
    return table


def _ratios(same: Sequence[Case], side: str) -> str:
    if side not in same[0]["seconds"]:
        return "–"
    ratios = [case["seconds"][UPSTREAM] / case["seconds"][side] for case in same]
    shown = f"{median(ratios):.2f}"
    if len(ratios) > 1 and side == "auto":
        shown += f" ({min(ratios):.2f}–{max(ratios):.2f})"
    return f"[bold]{shown}[/]" if side == "auto" else shown


def point_table(processes: Sequence[Sequence[Case]]) -> Table:
    """Forms of one linear layer's product beside the default, a row for each point."""
    forms = [form for form in processes[0][0]["seconds"] if form != DEFAULT]
    table = _table(
        f"one linear layer of all experts, forward + both gradients; × {DEFAULT}, "
        "least of all processes",
        "dtype", "elements", "experts", "rows", "padding", f"{DEFAULT} ms", *forms,
    )  # fmt: skip
    for same in zip(*processes, strict=True):
        found = same[0]
        gains = [least_gain(same, form) for form in forms]
        table.add_row(
            found["dtype"],
            *(str(found[name]) for name in ("elements", "num_experts", "rows", "padding")),
            f"{median(c['seconds'][DEFAULT] for c in same) * 1e3:.2f}",
            *(f"[bold]{gain:.2f}[/]" if gain > 1 + NOISE else f"{gain:.2f}" for gain in gains),
        )
    return table


def choice_table(rows: Sequence[Fastest]) -> Table:
    """What was written."""
    table = _table(
        f"chosen instead of {DEFAULT}", "device", "dtype", "weight up to", "mean rows up to",
        "fullest up to × mean", "form",
    )  # fmt: skip
    for row in rows:
        limits = (row.most_elements, row.most_rows, row.most_padding)
        table.add_row(row.device, row.dtype, *map(str, limits), row.form)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        left = column in ("shape", "workload", "dtype", "device", "form", "auto is")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    return table
