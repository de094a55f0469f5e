"""The results as a table: on the console, as CSV, and everything as JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_moe.tools.study.compare import Study
from megatron_moe.tools.study.files import written_whole
from megatron_moe.tools.study.findings import Finding, family
from megatron_moe.tools.study.plan import Plan
from megatron_moe.tools.study.variants import Variant


def console_table(study: Study, plan: Plan) -> Table:
    """One row a variant, by family."""
    table = Table(title=_title(study, plan), title_justify="left")
    for heading in ("variant", "what it is"):
        table.add_column(heading)
    for column in study.subject.columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for one in study.subject.families:
        names = family(study, one)
        for name in names:
            cells = (column.cell(study, plan, name) for column in study.subject.columns)
            says = study.variants[name].says
            table.add_row(name, says, *cells, end_section=name == names[-1])
    table.caption = study.subject.caption
    table.caption_justify = "left"
    return table


def _title(study: Study, plan: Plan) -> str:
    seeds = "1 seed" if plan.seeds == 1 else f"{plan.seeds} seeds, ± is a 95 % interval"
    return (
        f"{len(study.names)} {study.subject.noun}, {plan.steps} steps of "
        f"{plan.tokens_per_step} tokens, {seeds}"
    )


def write_csv(path: Path, study: Study, plan: Plan) -> None:
    """Write one row a variant: every measure with the half of its 95 % interval."""
    rows = []
    for name in study.names:
        variant = study.variants[name]
        row: dict[str, Any] = {"variant": name, "family": variant.family, "what": variant.says}
        for measure in study.subject.measures:
            row |= study.measured(name, measure).columns(measure)
        row["against"] = variant.against
        difference = study.difference(name, variant.against, "loss")
        row |= difference.columns("loss_difference")
        row |= study.subject.further(study, plan, name)
        rows.append(row)
    with written_whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_json(
    path: Path, study: Study, plan: Plan, found: Sequence[Finding], where: dict[str, Any]
) -> None:
    """Write everything: sizes, variants, every point of every run, and the findings.

    Args:
        path: Where to.
        study: The runs.
        plan: Sizes.
        found: Findings.
        where: What the runs were made with: versions, machine, command.
    """
    everything = {
        "made_with": where,
        "plan": asdict(plan),
        "variants": {name: _plain_variant(study.variants[name]) for name in study.names},
        "runs": [asdict(run) for run in study.runs],
        "findings": [asdict(one) for one in found],
    }
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(everything, indent=1) + "\n")


def _plain_variant(variant: Variant) -> dict[str, Any]:
    kept = {"says": variant.says, "family": variant.family, "against": variant.against}
    options = {key: dict(getattr(variant, key)) for key in ("model", "moe", "schedule")}
    rest = {"widen": variant.widen, "leaks": variant.leaks, "precision": variant.precision}
    return kept | options | rest


def spoken(found: Sequence[Finding]) -> str:
    """Findings as text."""
    parts = [f"{one.heading}\n" + "\n".join(f"  · {line}" for line in one.lines) for one in found]
    return "\n\n".join(parts)
