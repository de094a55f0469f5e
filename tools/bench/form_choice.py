"""From measured times to the rows of ``megatron_moe/experts/form_table.py``, by a fixed rule.

A form wins at a point if it was faster than the default by more than ``NOISE`` in every process. A
row of the table (largest weight, most rows, most padding) is taken if its form wins at every
measured point that lies within, and if no larger such row holds it. Of two rows that both fit, the
first counts: rows are sorted by what they gain in the mean.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from megatron_moe.experts.form_table import DEFAULT, TABLE, Fastest

NOISE = 0.05
TABLE_FILE = Path(__file__).parents[2] / "megatron_moe" / "experts" / "form_table.py"
_TABLE = re.compile(r"^TABLE: tuple\[Fastest, \.\.\.\] = \((?:\)|\n.*?^\))", re.S | re.M)
Found = dict[str, Any]  # a point's sizes with the seconds of each form
Corner = tuple[int, int, float]


def findings(processes: Sequence[Sequence[Found]]) -> tuple[Fastest, ...]:
    """The rows that the measurements allow.

    Args:
        processes: The points of each process, in the same order.
    """
    rows: list[tuple[float, Fastest]] = []
    points = list(zip(*processes, strict=True))
    for device, dtype in sorted({(p[0]["device"], p[0]["dtype"]) for p in points}):
        alike = [p for p in points if (p[0]["device"], p[0]["dtype"]) == (device, dtype)]
        for form in sorted(alike[0][0]["seconds"]):
            if form != DEFAULT:
                gains = [(_corner(point[0]), least_gain(point, form)) for point in alike]
                rows += [
                    (mean, Fastest(device, dtype, *corner, form)) for corner, mean in _rows(gains)
                ]
    return tuple(row for _, row in sorted(rows, key=_order))


def least_gain(point: Sequence[Found], form: str) -> float:
    """Speed relative to the default in the process where it was least."""
    return min(found["seconds"][DEFAULT] / found["seconds"][form] for found in point)


def _corner(found: Found) -> Corner:
    return found["elements"], found["rows"], found["padding"]


def _rows(gains: Sequence[tuple[Corner, float]]) -> list[tuple[Corner, float]]:
    """Corners below which a form wins everywhere, none within another, with the mean gain."""
    legal = {}
    for corner, _ in gains:
        below = [gain for other, gain in gains if _within(other, corner)]
        if all(gain > 1 + NOISE for gain in below):
            legal[corner] = prod(below) ** (1 / len(below))
    return [
        (corner, mean)
        for corner, mean in legal.items()
        if not any(_within(corner, other) for other in legal if other != corner)
    ]


def _within(inner: Corner, outer: Corner) -> bool:
    return all(a <= b for a, b in zip(inner, outer, strict=True))


def _order(row: tuple[float, Fastest]) -> tuple:
    gain, found = row
    corner = (found.most_elements, found.most_rows, found.most_padding)
    return found.device, found.dtype, -gain, found.form, corner


def written(source: str, new: Sequence[Fastest], device: str) -> str:
    """The table's source with the rows of a device replaced; those of others stay.

    Raises:
        ValueError: There is no table in it.
    """
    rows = sorted([row for row in TABLE if row.device != device], key=lambda row: row.device)
    lines = [
        f'    Fastest("{r.device}", "{r.dtype}", {r.most_elements}, {r.most_rows}, '
        f'{r.most_padding}, "{r.form}"),\n'
        for r in (*rows, *new)
    ]
    inside = "\n" + "".join(lines) if lines else ""
    text, replaced = _TABLE.subn(f"TABLE: tuple[Fastest, ...] = ({inside})", source)
    if replaced != 1:
        raise ValueError(f"the source has {replaced} tables of forms instead of one")
    return text
