"""The table of upstream's faults: figures of upstream's layer, of ours, and the right ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Figure = float | int | str

MENDED = "Megatron no longer shows this: take the row out of the README table"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault: what was wrong, what was measured, what each gave, and what ours does."""

    fault: str
    measured: str
    upstream: str
    ours: str
    right: str
    remedy: str


class FaultTable:
    """The rows of a session, in the order of the tests."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def compare(
        self,
        fault: str,
        *,
        measured: str,
        upstream: Sequence[Figure],
        ours: Sequence[Figure],
        right: Sequence[Figure],
        remedy: str,
        form: str = "{}",
    ) -> None:
        """Take a row down, then hold it to its claim.

        Args:
            fault: What is wrong upstream.
            measured: What the figures are.
            upstream: Figures measured with Megatron's layer; each must be wrong.
            ours: The same with ours; each must be right, to 0.1 %.
            right: What they must be.
            remedy: What ours does.
            form: Format of one figure.

        Raises:
            AssertionError: Ours is wrong, or upstream is right.
        """
        texts = [" / ".join(_text(form, f) for f in figures) for figures in (upstream, ours, right)]
        self.rows.append(
            Row(
                fault=fault,
                measured=measured,
                upstream=texts[0],
                ours=texts[1],
                right=texts[2],
                remedy=remedy,
            )
        )
        for mine, true in zip(ours, right, strict=True):
            assert _near(mine, true, 1e-3), f"{fault}: ours gives {texts[1]}, right is {texts[2]}"
        for theirs, true in zip(upstream, right, strict=True):
            assert not _near(theirs, true, 0.05), f"{MENDED} ({fault}: {texts[0]})"

    def markdown(self) -> str:
        """The table as the README shows it; what is right is what stands under "here"."""
        lines = [
            "| What was wrong upstream | Measured | There | Here | What we do |",
            "|---|---|---|---|---|",
        ]
        for row in self.rows:
            cells = (row.fault, row.measured, row.upstream, row.ours, row.remedy)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join(lines) + "\n"

    def text(self) -> str:
        """The table as a terminal shows it: a block a fault."""
        blocks = []
        for number, row in enumerate(self.rows, start=1):
            blocks.append(
                f"{number:2}. {row.fault}\n"
                f"      measured: {row.measured}\n"
                f"      upstream: {row.upstream}\n"
                f"      ours:     {row.ours}   (right: {row.right})\n"
                f"      how:      {row.remedy}"
            )
        return "\n".join(blocks)

    def write(self, path: Path) -> None:
        """Write the markdown table to ``path``."""
        path.write_text(self.markdown())


def _text(form: str, figure: Figure) -> str:
    return figure if isinstance(figure, str) else form.format(figure)


def _near(found: Figure, true: Figure, tolerance: float) -> bool:
    if isinstance(found, str) or isinstance(true, str):
        return found == true
    return math.isclose(found, true, rel_tol=tolerance, abs_tol=tolerance)
