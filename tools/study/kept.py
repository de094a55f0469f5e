"""Finished runs on disk, so that a study that was stopped, or wants one seed more, can go on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_moe.tools.study.files import written_whole
from megatron_moe.tools.study.history import Point, Run
from megatron_moe.tools.study.plan import Plan
from megatron_moe.tools.study.variants import Variant

# They say which runs there are, not what one run is.
_NOT_OF_A_RUN = ("seeds", "chosen")


def keep(folder: Path, plan: Plan, variant: Variant, run: Run) -> None:
    """Write one finished run."""
    content = {"made_by": _made_by(plan, variant), "run": asdict(run)}
    with written_whole(_path(folder, variant, run.seed)) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def find(folder: Path, plan: Plan, variant: Variant, seed: int) -> Run | None:
    """Read a finished run; None if there is none of this size with these options.

    Code that has changed since cannot be told: who edits a model must not ask for kept runs.
    """
    path = _path(folder, variant, seed)
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    if content["made_by"] != _made_by(plan, variant):
        return None
    fields = content["run"]
    return Run(**fields | {"points": tuple(Point(**point) for point in fields["points"])})


def _path(folder: Path, variant: Variant, seed: int) -> Path:
    return folder / "runs" / f"{variant.name}-{seed}.json"


def _made_by(plan: Plan, variant: Variant) -> dict[str, Any]:
    sizes = {name: value for name, value in asdict(plan).items() if name not in _NOT_OF_A_RUN}
    options = asdict(variant)
    # Through JSON, which knows no tuples, to compare like with like.
    return json.loads(json.dumps({"plan": sizes, "variant": options}))
