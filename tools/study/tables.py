"""The results as a table: on the console, as CSV, and everything as JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_moe.tools.study.compare import MEASURES, Estimate, Study
from megatron_moe.tools.study.files import written_whole
from megatron_moe.tools.study.findings import Finding, signed
from megatron_moe.tools.study.plan import Plan
from megatron_moe.tools.study.variants import FAMILIES, VARIANTS


def console_table(study: Study, plan: Plan) -> Table:
    """One row a variant, by family."""
    table = Table(title=_title(study, plan), title_justify="left")
    for heading in ("variant", "what it is"):
        table.add_column(heading)
    headings = (
        "loss",
        "difference",
        "load cv",
        "entropy",
        "drops",
        "churn",
        "in context",
        "mean k",
        "work",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for family in FAMILIES:
        names = [name for name in study.names if VARIANTS[name].family == family]
        for name in names:
            table.add_row(*_cells(study, plan, name), end_section=name == names[-1])
    table.caption = (
        "loss: validation, at the end; difference: from the variant it is compared with; the rest "
        "in the mean of the run's second half; churn: choices changed between two measurements, on "
        "a fixed probe; in context: in training, since the same four tokens were read; work: "
        "arithmetic in experts over the baseline's"
    )
    table.caption_justify = "left"
    return table


def _title(study: Study, plan: Plan) -> str:
    seeds = "1 seed" if plan.seeds == 1 else f"{plan.seeds} seeds, ± is a 95 % interval"
    return (
        f"{len(study.names)} routers, {plan.steps} steps of {plan.tokens_per_step} tokens, {seeds}"
    )


def _cells(study: Study, plan: Plan, name: str) -> list[str]:
    variant = VARIANTS[name]

    def of(measure: str, pattern: str) -> str:
        return pattern.format(study.measured(name, measure).mean)

    compared = variant.against != name and study.has(variant.against)
    difference = signed(study.difference(name, variant.against, "loss")) if compared else ""
    return [
        name,
        variant.says,
        of("loss", "{:.4f}") + ("*" if variant.leaks else ""),
        difference,
        of("cv", "{:.3f}"),
        of("entropy", "{:.4f}"),
        of("drop_rate", "{:.1%}"),
        of("churn", "{:.1%}"),
        of("context_churn", "{:.1%}"),
        of("mean_k", "{:.3f}"),
        f"{study.work(name, plan):.2f}",
    ]


def write_csv(path: Path, study: Study, plan: Plan) -> None:
    """Write one row a variant: every measure with the half of its 95 % interval."""
    rows = []
    for name in study.names:
        variant = VARIANTS[name]
        row: dict[str, Any] = {"variant": name, "family": variant.family, "what": variant.says}
        for measure in MEASURES:
            row |= _columns(measure, study.measured(name, measure))
        row["against"] = variant.against
        difference = study.difference(name, variant.against, "loss")
        row |= _columns("loss_difference", difference) | {"work": study.work(name, plan)}
        rows.append(row)
    with written_whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _columns(name: str, e: Estimate) -> dict[str, float | None]:
    return {name: e.mean, f"{name}_half": e.half}


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
        "variants": {name: _plain_variant(name) for name in study.names},
        "runs": [asdict(run) for run in study.runs],
        "findings": [asdict(one) for one in found],
    }
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(everything, indent=1) + "\n")


def _plain_variant(name: str) -> dict[str, Any]:
    variant = VARIANTS[name]
    kept = {"says": variant.says, "family": variant.family, "against": variant.against}
    options = {key: dict(getattr(variant, key)) for key in ("model", "moe", "schedule")}
    return kept | options | {"widen": variant.widen, "leaks": variant.leaks}


def spoken(found: Sequence[Finding]) -> str:
    """Findings as text."""
    parts = [f"{one.heading}\n" + "\n".join(f"  · {line}" for line in one.lines) for one in found]
    return "\n\n".join(parts)
