"""The table of the router benchmark, with its goals."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.table import Table

from megatron_moe.tools.bench.route_case import AGAINST, GOALS, KINDS, PARTS
from megatron_moe.tools.bench.tables import verdict

Result = dict[str, Any]
NOTES = (
    "ms of CPU time on one thread, forward + backward · gate = its three matrix products alone, "
    "the same for all sides · × = speed of ours relative to that side · against the naive loop "
    "ours brings the choices into expert order too (second figure), as the loop does · "
    "at most = naive ÷ gate, what a router would reach that took no time besides its gate"
)


def ratios(results: Sequence[Result], part: str, side: str) -> list[float]:
    """Speed of ours relative to a side, in each process."""
    times = [result["seconds"][part] for result in results]
    return [time[side] / time[AGAINST[side]] for time in times]


def most(results: Sequence[Result]) -> float:
    """Speed relative to the naive loop that no router with this gate can pass."""
    return median(r["seconds"]["whole"]["naive"] / r["gate"] for r in results)


def naive_verdict(ratio: float, most: float | None) -> str:
    """Say whether the goal against the naive loop is met, and where the gate forbids it."""
    said = verdict(ratio, GOALS["naive"])
    if most is None or most >= GOALS["naive"]:
        return said
    return f"{said}, at most {most:.1f}"


def route_table(processes: Sequence[Sequence[Result]], kind: str) -> Table:
    """Two rows for each case: the whole router, and the router without its gate.

    Args:
        processes: The results of each process; times and ratios shown are medians over them.
        kind: Of the routing, for the title.
    """
    table = Table(
        title=f"router, forward + backward, fp32: {kind} ({KINDS[kind]})",
        title_justify="left",
        title_style="bold",
    )
    for column in ("case", "part"):
        table.add_column(column)
    for column in ("gate ms", "naive ms", "upstream ms", "ours ms", "naive ×"):
        table.add_column(column, justify="right")
    table.add_column(f"goal ≥ {GOALS['naive']:.0f}")
    table.add_column("upstream ×", justify="right")
    table.add_column(f"goal ≥ {GOALS['upstream']:.0f}")
    table.add_column("difference", justify="right")
    for same in zip(*processes, strict=True):
        for part in PARTS:
            table.add_row(*_row(same, part), end_section=part == PARTS[-1])
    return table


def _row(results: Sequence[Result], part: str) -> list[str]:
    whole = part == PARTS[0]
    times = {
        side: median(r["seconds"][part][side] for r in results)
        for side in results[0]["seconds"][part]
    }
    naive, upstream = ratios(results, part, "naive"), ratios(results, part, "upstream")
    return [
        results[0]["name"] if whole else "",
        part,
        _ms(median(r["gate"] for r in results)) if whole else "",
        _ms(times["naive"]),
        _ms(times["upstream"]),
        f"{_ms(times['ours'])} / {_ms(times['ours, by expert'])}",
        _shown(naive),
        naive_verdict(median(naive), most(results) if whole else None),
        _shown(upstream),
        verdict(median(upstream), GOALS["upstream"]),
        f"{max(max(r['differences'].values()) for r in results):.0e}" if whole else "",
    ]


def _shown(found: Sequence[float]) -> str:
    spread = f" ({min(found):.2f}–{max(found):.2f})" if len(found) > 1 else ""
    return f"[bold]{median(found):.2f}[/]{spread}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"
