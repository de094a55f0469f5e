"""Which form of the grouped GEMM was measured to be the fastest, by device, dtype and shape.

The rows are written by ``python tools/bench/experts.py --update-table``; figures in
tools/bench/RESULTS.md. A form other than ``grouped_mm`` is entered only where it was faster by more
than the noise, in every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

DEFAULT = "grouped_mm"


@dataclass(frozen=True, slots=True)
class Fastest:
    """One finding.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: As torch spells it, without ``torch.``.
        most_elements: Largest weight of one expert (F · D) for which it holds.
        most_rows: Most rows of an expert, in the mean, for which it holds.
        most_padding: Largest ratio of the fullest expert's rows to the mean.
        form: The fastest.
    """

    device: str
    dtype: str
    most_elements: int
    most_rows: int
    most_padding: float
    form: str


TABLE: tuple[Fastest, ...] = (
    Fastest("cpu", "bfloat16", 32768, 256, 1.0, "batched"),
    Fastest("cpu", "bfloat16", 1048576, 4, 1.0, "batched"),
    Fastest("cpu", "bfloat16", 229376, 128, 1.0, "batched"),
    Fastest("cpu", "bfloat16", 16384, 64, 1.25, "batched"),
    Fastest("cpu", "bfloat16", 229376, 16, 1.25, "batched"),
    Fastest("cpu", "bfloat16", 32768, 16, 2.0, "batched"),
    Fastest("cpu", "float32", 229376, 4, 1.0, "batched"),
    Fastest("cpu", "float32", 32768, 16, 1.0, "batched"),
    Fastest("cpu", "float32", 16384, 128, 1.0, "batched"),
)


def fastest(
    device_type: str, dtype: torch.dtype, elements: int, rows_e: Sequence[int]
) -> tuple[str, str]:
    """The form to take, and why.

    Args:
        device_type: ``cpu`` or ``cuda``.
        dtype: Of the operands.
        elements: Of one expert's weight.
        rows_e: Rows of each expert.
    """
    mean = sum(rows_e) / len(rows_e)
    for row in TABLE:
        if (
            (row.device, row.dtype) == (device_type, str(dtype).removeprefix("torch."))
            and elements <= row.most_elements
            and 0 < mean <= row.most_rows
            and max(rows_e) <= row.most_padding * mean
        ):
            return row.form, f"measured fastest up to {row.most_rows} rows of {row.most_elements}"
    return DEFAULT, "measured fastest in general"
