"""The commands ``inspect``, ``reshard`` and ``verify``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megatron_moe.tools.checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    from megatron_moe.tools.checkpoint.plan.compile import Plan
    from megatron_moe.tools.checkpoint.read.opened import Opened

_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class _Bytes(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        digits = value.upper().removesuffix("B").removesuffix("I")
        unit = digits[-1:] if digits[-1:] in "KMGT" else ""
        try:
            return int(float(digits.removesuffix(unit)) * _UNITS[unit])
        except ValueError:
            self.fail(f"{value!r} is no size; say 512M or 2G", param, ctx)


def _source_options(command: Callable) -> Callable:
    for option in (
        click.option("--iteration", type=int, help="Which iteration; the tracker's by default."),
        click.option(
            "--trust",
            multiple=True,
            metavar="MODULE.NAME",
            help="Let a name in a pickle pass, unrun. May be given again.",
        ),
    ):
        command = option(command)
    return command


def _open(path: Path, iteration: int | None, trust: tuple[str, ...], **options: Any) -> Opened:
    from megatron_moe.tools.checkpoint.read.open import open_checkpoint

    return open_checkpoint(path, iteration=iteration, trusted=frozenset(trust), **options)


class _Told(click.Command):
    """A command whose errors are one line, not a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CheckpointError as fault:
            print(f"megatron-moe {ctx.info_name}: {fault}", file=sys.stderr)
            sys.exit(1)
        except OSError as fault:
            print(f"megatron-moe {ctx.info_name}: {fault}", file=sys.stderr)
            sys.exit(1)


@click.command("inspect", cls=_Told, context_settings=_SETTINGS)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--atoms", is_flag=True, help="List every tensor, as it is whatever the layout.")
@_source_options
def inspect_command(
    checkpoint: Path, as_json: bool, atoms: bool, iteration: int | None, trust: tuple[str, ...]
) -> None:
    """Say what CHECKPOINT is: layout, dialect, experts, sizes, optimizer, known faults.

    Reads no tensor, imports neither torch nor Megatron, changes nothing.
    """
    from megatron_moe.tools.checkpoint.inspect import facts, warnings

    opened = _open(checkpoint, iteration, trust)
    found: dict[str, Any] = facts(opened) | {"warnings": warnings(opened)}
    listed = {
        str(atom): [held.dtype.name, list(held.shape)]
        for atom, held in sorted(opened.tensors.atoms.items())
    }
    if as_json:
        print(json.dumps(found | ({"atoms": listed} if atoms else {}), indent=2))
        return
    width = max(map(len, found))
    for name, value in found.items():
        if name != "warnings" and value not in (None, []):
            print(f"{name:<{width}}  {_shown(value)}")
    for warning in found["warnings"]:
        print(f"warning: {warning}")
    if atoms:
        for name, (dtype, shape) in listed.items():
            print(f"{dtype:<9} {'×'.join(map(str, shape)) or '1':<16} {name}")


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, dict, list)):
        return str(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    if isinstance(value, list):
        flat = [item[0] if isinstance(item, list) and len(item) == 1 else item for item in value]
        return ", ".join(map(str, flat))
    return f"{value:,}"


@click.command("reshard", cls=_Told, context_settings=_SETTINGS)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tp", type=int, help="Tensor-parallel size; as in the source by default.")
@click.option("--pp", type=int, help="Pipeline-parallel size.")
@click.option("--vpp", type=int, help="Model chunks of a pipeline rank (virtual stages).")
@click.option("--ep", type=int, help="Expert-parallel size.")
@click.option("--etp", type=int, help="Expert-tensor-parallel size; where it was TP, it stays TP.")
@click.option("--dp", type=int, help="Data-parallel size; matters to dp_reshardable and torch.")
@click.option("--format", "form", type=click.Choice(["torch", "torch_dist"]))
@click.option("--dialect", type=click.Choice(["0.16", "0.17", "0.19"]), help="Megatron to load it.")
@click.option(
    "--optim",
    type=click.Choice(["keep", "drop", "plain", "fully", "dp"]),
    default="keep",
    help="Optimizer state: as it is, none, that of a run without the distributed optimizer, "
    "fully_reshardable, dp_reshardable.",
)
@click.option(
    "--experts",
    type=click.Choice(["sequential", "grouped", "stacked", "single", "grouped_mlp"]),
    help="Names of experts in torch files, and their order in flat buffers: SequentialMLP, "
    "TEGroupedMLP, this plugin's grouped experts, one tensor (--moe-single-grouped-weight), "
    "GroupedMLP up to Megatron 0.16.",
)
@click.option("--spec", type=click.Choice(["local", "te"]), help="Names of norms.")
@click.option("--decoder-first-pipeline-num-layers", "first", type=int)
@click.option("--decoder-last-pipeline-num-layers", "last", type=int)
@click.option("--pipeline-layout", help="As Megatron's --pipeline-model-parallel-layout.")
@click.option("--make-vocab-size-divisible-by", "divisible_by", type=int)
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: the whole plan as JSON.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option("--force", is_flag=True, help="Replace what is in OUT.")
@click.option("--no-links", is_flag=True, help="Copy unchanged files; by default hard-link them.")
@click.option("--drop-unknown-args", is_flag=True, help="Leave out arguments of newer classes.")
@click.option("--no-verify-source", is_flag=True, help="Do not check CRCs of what is read.")
@click.option("--workers", type=int, help="Processes; the CPUs, 4 at most, by default.")
@click.option("--max-ram", type=_Bytes(), default="1G", help="For buffers of all processes.")
@click.option("--progress", type=click.Choice(["bar", "json", "none"]), default="bar")
@_source_options
def reshard_command(
    checkpoint: Path,
    out: Path,
    dry_run: bool,
    as_json: bool,
    resume: bool,
    force: bool,
    no_links: bool,
    no_verify_source: bool,
    workers: int | None,
    max_ram: int,
    progress: str,
    iteration: int | None,
    trust: tuple[str, ...],
    **wishes: Any,
) -> None:
    """Write CHECKPOINT to OUT for another parallel layout, format or kind of optimizer.

    What is not asked for stays as it is. Every element of the source is used once or listed as
    dropped, every element of the target written once, or nothing is written at all. OUT gets its
    checkpoint in one rename at the end; Megatron's tracker file follows last.
    """
    from megatron_moe.tools.checkpoint.plan.compile import compile_plan
    from megatron_moe.tools.checkpoint.plan.request import Request, resolve

    opened = _open(checkpoint, iteration, trust, optimizer=wishes["optim"] != "drop")
    to = resolve(opened, Request(**wishes, links=not no_links))
    plan = compile_plan(opened, to)
    if dry_run:
        print(json.dumps(plan.describe(), indent=1) if as_json else _summary(plan))
        return
    from megatron_moe.tools.checkpoint.write.execute import Options, execute

    options = Options(
        workers=workers or min(os.cpu_count() or 1, 4),
        max_ram=max_ram,
        force=force,
        resume=resume,
        verify_source=not no_verify_source,
        progress=progress,
    )
    print(_summary(plan))
    final = execute(plan, out, options)
    print(f"written: {final}")


def _summary(plan: Plan) -> str:
    lines = [
        f"from {plan.source.location.form} {plan.source.layout} "
        f"({plan.source.optimizer.kind if plan.source.optimizer else 'no optimizer'})",
        f"to   {plan.to.form} {plan.to.layout} ({plan.to.optimizer or 'no optimizer'}), "
        f"{plan.to.layout.world_size} ranks",
        f"{len(plan.target.files)} files, {plan.write_bytes:,} bytes new, "
        f"{plan.linked_bytes:,} linked; {plan.read_bytes:,} bytes of {len(plan.jobs)} tensors read",
    ]
    rows = [drop for drop in plan.dropped if drop.what.partition(" ")[2].startswith("rows of")]
    for drop in plan.dropped:
        if drop not in rows:
            count = f" ({drop.elements:,} elements)" if drop.elements else ""
            lines.append(f"dropped: {drop.what}{count}: {drop.reason}")
    if rows:
        total = sum(drop.elements for drop in rows)
        lines.append(f"dropped: {total:,} elements of {len(rows)} tensors: {rows[0].reason}")
    if plan.invented:
        total, tensors = sum(plan.invented.values()), len(plan.invented)
        lines.append(f"invented: {total:,} zeros in {tensors} tensors: rows of a longer vocabulary")
    lines += [f"note: {note}" for note in plan.target.notes + plan.source.notes]
    return "\n".join(lines)


@click.command("verify", cls=_Told, context_settings=_SETTINGS)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path), required=False)
@click.option("--weights-only", is_flag=True, help="Leave optimizer state alone.")
@click.option("--fast", is_flag=True, help="With B: trust manifests; read only what they lack.")
@click.option("--workers", type=int, help="Processes; the CPUs, 4 at most, by default.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_source_options
def verify_command(
    a: Path,
    b: Path | None,
    weights_only: bool,
    fast: bool,
    workers: int | None,
    as_json: bool,
    iteration: int | None,
    trust: tuple[str, ...],
) -> None:
    """Prove checkpoint A whole; with B, that B holds the same in whatever format and layout.

    A alone: every tensor covered, every CRC, replicas equal, fp32 masters round to their weights.
    Exit code 1 when something is wrong: each line names file, tensor and cause.
    """
    from megatron_moe.tools.checkpoint.verify import compare, verify
    from megatron_moe.tools.checkpoint.write import manifest

    count = workers or min(os.cpu_count() or 1, 4)
    sides = [_open(a, iteration, trust, optimizer=not weights_only)]
    if b is not None:
        sides.append(_open(b, None, trust, optimizer=not weights_only))
    faults: list = []
    known: list = []
    warnings: list[str] = []
    checked: list = []
    for side in sides:
        if fast and b is not None:
            known.append(manifest.digests_of(side))
            continue
        verdict = verify(side, workers=count)
        faults += verdict.faults
        warnings += verdict.warnings
        known.append(verdict.digests)
        checked.append({"folder": str(side.folder), **verdict.checked})
    if b is not None:
        faults += compare(sides[0], sides[1], known[0], known[1])
    if as_json:
        found = {"checked": checked, "warnings": warnings, "faults": [f._asdict() for f in faults]}
        print(json.dumps(found, indent=1))
    else:
        for one in checked:
            counts = ", ".join(f"{n:,} {k}" for k, n in one.items() if k != "folder")
            print(f"{one['folder']}: {counts}")
        for warning in warnings:
            print(f"warning: {warning}")
        for fault in faults:
            print(f"WRONG {fault}")
        verdict_text = "equal" if b is not None else "whole"
        print(f"{len(faults)} faults" if faults else verdict_text)
    sys.exit(1 if faults else 0)
