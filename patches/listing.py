"""``megatron-moe patches``: what is declared, and whether it fits what is installed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from megatron_moe.mcore.patching import Patch

_README = Path(__file__).parent / "README.md"
_START, _END = "<!-- patches: begin -->\n", "<!-- patches: end -->\n"


@dataclass(frozen=True)
class Row:
    """One declared patch, where it applies, and why it does not fit (None: it does)."""

    patch: Patch
    where: str
    misfit: str | None


def rows() -> list[Row]:
    """Check every declared patch against the installed Megatron and torch."""
    from megatron_moe.activate import import_megatron
    from megatron_moe.config import MoEConfig
    from megatron_moe.mcore.patching import PatchError, check

    import_megatron()
    from megatron_moe.patches import cpu, megatron
    from megatron_moe.patches.megatron.mtp import mtp_patch

    def row(patch: Patch, where: str) -> Row:
        try:
            check(patch)
        except PatchError as misfit:
            return Row(patch, where, str(misfit).removeprefix(f"{patch.target}: "))
        return Row(patch, where, None)

    anywhere = (*megatron.ALL, mtp_patch(MoEConfig()))
    return [row(p, "always") for p in anywhere] + [row(p, "--device cpu") for p in cpu.ALL]


def markdown(found: list[Row]) -> str:
    """Return the table for README.md; it says nothing of this machine."""
    lines = [
        "| Target | In force | Why | Versions | Until |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        patch = row.patch
        versions = f"{patch.distribution} {patch.versions}"
        cells = (f"`{patch.target}`", f"`{row.where}`" if "-" in row.where else row.where)
        lines.append("| " + " | ".join([*cells, patch.reason, versions, patch.retire_when]) + " |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--write", is_flag=True, help="Also renew the table in patches/README.md.")
def command(write: bool) -> None:
    """List the declared patches of Megatron and torch, and whether each fits.

    Exits with 1 when one does not.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = rows()
    table = Table("target", "in force", "why", "versions", "fits", box=None, padding=(0, 1, 1, 0))
    table.columns[0].overflow = "fold"
    for row in found:
        patch = row.patch
        fits = "yes" if row.misfit is None else row.misfit
        versions = f"{patch.distribution} {patch.versions}"
        style = "" if row.misfit is None else "red"
        cells = (patch.target, row.where, patch.reason, versions, fits)
        table.add_row(*map(escape, cells), style=style)
    misfits = [row for row in found if row.misfit is not None]
    console = Console()
    console.print(table)
    console.print(f"{len(found)} patches, {len(misfits)} of them do not fit")
    if write:
        before, _, rest = _README.read_text().partition(_START)
        _, _, after = rest.partition(_END)
        _README.write_text(before + _START + markdown(found) + _END + after)
    raise SystemExit(1 if misfits else 0)
