"""The resharding benchmark's figures against its goals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rich.table import Table

from megatron_moe.tools.bench.watch import Cost

GOAL_CP = 1.3  # times the seconds of cp
GOAL_LOAD_SAVE = 4.0  # times faster than load and save
GOAL_PRIVATE = 1e9  # bytes
GOAL_READ = 1.05  # times the source
GOAL_METADATA_S = 5.0
GOAL_HELP_S = 1.0


@dataclass(frozen=True)
class Row:
    """Figures of a case.

    Args:
        name: Shown.
        source: Bytes of the source; 0 for a command without.
        rewrites: Whether every byte is written anew.
        costs: By side, one for each round: ``ours``, and perhaps ``cp`` and ``load+save``.
    """

    name: str
    source: int
    rewrites: bool
    costs: dict[str, list[Cost]]

    def ratio(self, over: str, under: str) -> tuple[float, float, float] | None:
        """Return median, least and greatest ratio of two sides' seconds, round by round."""
        if over not in self.costs or under not in self.costs:
            return None
        pairs = zip(self.costs[over], self.costs[under], strict=True)
        ratios = [a.seconds / b.seconds for a, b in pairs]
        return median(ratios), min(ratios), max(ratios)

    def middle(self, figure: str, side: str = "ours") -> float:
        """Return the median of one figure of a side."""
        return median(getattr(cost, figure) for cost in self.costs[side])

    def goals(self) -> dict[str, bool]:
        """Return which goals apply, and whether each is met."""
        met = {}
        if found := self.ratio("ours", "cp"):
            met[f"≤ {GOAL_CP}× cp"] = found[0] <= GOAL_CP
        if found := self.ratio("load+save", "ours"):
            met[f"≥ {GOAL_LOAD_SAVE:.0f}× load+save"] = found[0] >= GOAL_LOAD_SAVE
        if self.source:
            private = max(cost.private for cost in self.costs["ours"])
            met["≤ 1 GB private"] = private <= GOAL_PRIVATE
        if self.rewrites:
            met[f"read ≤ {GOAL_READ}×"] = self.middle("read") <= GOAL_READ * self.source
        elif self.source:
            met[f"< {GOAL_METADATA_S:.0f} s"] = self.middle("seconds") < GOAL_METADATA_S
        elif "--help" in self.name:
            met[f"< {GOAL_HELP_S:.0f} s"] = self.middle("seconds") < GOAL_HELP_S
        return met


def cost_table(rows: Sequence[Row], what: str) -> Table:
    """Return the table, a line for each case."""
    table = Table(title=f"resharding {what}", title_justify="left", title_style="bold")
    for column in ("case", "GB", "seconds", "cp s", "× cp", "load+save s", "÷ load+save", "CPU s",
                   "private MB", "load+save MB", "read ×", "goals"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("case", "goals") else "right")
    for row in rows:
        peak = {s: max(c.private for c in costs) / 1e6 for s, costs in row.costs.items()}
        table.add_row(
            row.name,
            f"{row.source / 1e9:.2f}" if row.source else "–",
            f"{row.middle('seconds'):.2f}",
            f"{row.middle('seconds', 'cp'):.2f}" if "cp" in row.costs else "–",
            _spread(row.ratio("ours", "cp")),
            f"{row.middle('seconds', 'load+save'):.1f}" if "load+save" in row.costs else "–",
            _spread(row.ratio("load+save", "ours")),
            f"{row.middle('cpu'):.1f}",
            f"{peak['ours']:.0f}",
            f"{peak['load+save']:.0f}" if "load+save" in peak else "–",
            f"{row.middle('read') / row.source:.2f}" if row.rewrites else "–",
            "\n".join(_verdict(goal, met) for goal, met in row.goals().items()),
        )
    return table


def _spread(found: tuple[float, float, float] | None) -> str:
    if found is None:
        return "–"
    middle, least, most = found
    return f"[bold]{middle:.2f}[/]" + (f" ({least:.2f}–{most:.2f})" if most > least else "")


def _verdict(goal: str, met: bool) -> str:
    return f"{goal} " + ("[green]met[/]" if met else "[red]not met[/]")
