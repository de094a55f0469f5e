"""The tables that a reader sees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from rich.table import Table

from megatron_moe.tools.bench.shapes import SHAPES

# Repetitions of a quiet machine lie within 1 %, of a loaded one within 7 % (MARGIN of a goal).
MARGIN = 0.05
Case = dict[str, Any]
PHASE_NAMES = {
    "route": "route",
    "permute": "permute",
    "exchange": "exchange",
    "experts": "GEMM + act.",
    "combine": "combine",
}


def speed_table(processes: Sequence[Sequence[Case]], dtype: str, *, gated: bool) -> Table:
    """Forward and backward of both layers beside the limit, a row for each shape.

    Args:
        processes: The cases of each process; times and ratios shown are medians over processes.
        dtype: Of the cases to show.
        gated: Goals were set for plain experts: none are shown.
    """
    table = _table(
        f"forward + backward, {dtype}, {'gated' if gated else 'plain (GELU)'} experts",
        "shape", "upstream ms", "ours ms", "limit ms", "ours ×", "spread", "sequential ×",
        "of limit", "goal ×", "", "difference",
    )  # fmt: skip
    for cases in _by_shape(processes, dtype):
        ratios = [_ratio(case, "ours") for case in cases]
        ratio, name = median(ratios), cases[0]["shape"]
        sequential = [_ratio(c, "ours, sequential") for c in cases if len(c["seconds"]) == 4]
        goal = None if gated else SHAPES[name].goals[dtype]
        table.add_row(
            name,
            *(
                _ms(median(c["seconds"][side] for c in cases))
                for side in ("upstream", "ours", "limit")
            ),
            f"[bold]{ratio:.2f}[/]",
            f"{min(ratios):.2f}–{max(ratios):.2f}" if len(ratios) > 1 else "–",
            f"{median(sequential):.2f}" if sequential else "–",
            f"{median(c['seconds']['limit'] / c['seconds']['ours'] for c in cases):.2f}",
            f"≥ {goal:.2f}" if goal else "–",
            verdict(ratio, goal) if goal else "",
            f"{max(c['differences']['ours'] for c in cases):.0e}",
        )
    return table


def verdict(ratio: float, goal: float) -> str:
    """Say whether a goal is met; a median may lie below it by the margin of the measurement."""
    if ratio >= goal:
        return "[green]met[/]"
    return "[yellow]in the noise[/]" if ratio >= goal * (1 - MARGIN) else "[red]missed[/]"


def phase_table(processes: Sequence[Sequence[Case]], dtype: str) -> Table:
    """Milliseconds of each phase, forward and backward together, two rows for each shape."""
    table = _table(f"by phase, ms, {dtype}", "shape", "layer", *PHASE_NAMES.values(), "sum")
    for cases in _by_shape(processes, dtype):
        for side in ("upstream", "ours"):
            phases = [median(c["phases"][side][phase] for c in cases) for phase in PHASE_NAMES]
            name = cases[0]["shape"] if side == "upstream" else ""
            table.add_row(name, side, *map(_ms, phases), _ms(sum(phases)))
    return table


def held_table(processes: Sequence[Sequence[Case]]) -> Table:
    """Bytes held for backward, as multiples of the least that suffices."""
    dtypes = list(dict.fromkeys(case["dtype"] for case in processes[0]))
    columns = [f"{dtype}: {what}" for dtype in dtypes for what in ("minimum", "upstream", "ours")]
    table = _table("bytes held for backward (minimum = input + pre-activation + routing)",
                   "shape", *columns)  # fmt: skip
    for name in dict.fromkeys(case["shape"] for case in processes[0]):
        row = []
        for case in (c for c in processes[0] if c["shape"] == name):
            held = case["held"]
            row.append(f"{held['minimum'] / 2**20:.1f} MiB")
            row += [f"{held[side] / held['minimum']:.2f}×" for side in ("upstream", "ours")]
        table.add_row(name, *row)
    return table


def traffic_table(cases: Iterable[Case]) -> Table:
    """Collectives of one step on one of two expert-parallel ranks."""
    table = _table(
        "exchange between 2 expert-parallel processes, one step, one rank",
        "shape", "layer", "all-to-alls", "MB in them", "other collectives", "exchange ms",
    )  # fmt: skip
    for case in cases:
        for side, traffic in case["traffic"].items():
            others = {k: n for k, n in traffic["calls"].items() if k != "all-to-all"}
            table.add_row(
                f"{case['shape']} {case['dtype']}" if side == "upstream" else "",
                side,
                str(traffic["calls"]["all-to-all"]),
                f"{traffic['bytes']['all-to-all'] / 1e6:.1f}",
                ", ".join(f"{n} {k}" for k, n in others.items()) or "none",
                _ms(traffic["exchange"]),
            )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        numeric = column not in ("shape", "layer", "other collectives", "")
        table.add_column(column, justify="right" if numeric else "left")
    return table


def _by_shape(processes: Sequence[Sequence[Case]], dtype: str) -> list[list[Case]]:
    """The repetitions of each case of a dtype."""
    return [list(same) for same in zip(*processes, strict=True) if same[0]["dtype"] == dtype]


def _ratio(case: Case, side: str) -> float:
    return case["seconds"]["upstream"] / case["seconds"][side]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"
