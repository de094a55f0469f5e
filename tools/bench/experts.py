"""The experts' stage alone, in every back end, beside upstream's experts and the matrix products.

    python tools/bench/experts.py --quick

Rows lie sorted by expert already; measured are first layer, activation, second layer, forward and
backward: ``sequential`` (Megatron's linear layers, one expert after another), our grouped experts
in each form of the product and as ``auto`` chooses, ``separate weights`` (one product an expert
under plain autograd), Transformer Engine's grouped experts on a GPU that has them.

The figures are made as in ``layer.py``: allocator pinned before Python starts, one thread, CPU
time, sides in turns, the fastest of several rounds, outputs and gradients compared before anything
is timed, and the median over several processes.

With ``--update-table`` the forms alone are compared, at one linear layer of many sizes, and the
table from which ``auto`` chooses is written anew by the rule of ``form_choice``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from megatron_moe.tools.bench import experts_table as tables
from megatron_moe.tools.bench import form_choice
from megatron_moe.tools.bench.child import measured_by
from megatron_moe.tools.bench.experts_case import (
    CUDA_TOKENS,
    DTYPES,
    MOST_PADDED,
    QUICK_TOKENS,
    TOKENS,
    WORKLOAD_NOTE,
    ExpertsJob,
    points_of,
    shapes_of,
)
from megatron_moe.tools.bench.layer import describe_machine

QUICK_SHAPES = {"cpu": ["mixtral/16", "qwen3-30b/8"], "cuda": ["qwen3-30b"]}
WIDTH = 180
PROCESSES = 3  # in each of which a form must be faster to be chosen


@click.command()
@click.option("--quick", is_flag=True, help="Two shapes, one process: under 90 s on a quiet core.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="On cuda the models' own sizes are measured.")  # fmt: skip
@click.option("--shapes", help="Names with commas between [all of the device].")
@click.option("--rounds", type=click.IntRange(min=1), help="Of which the fastest counts [5].")
@click.option("--processes", type=click.IntRange(min=1), help="Repetitions of it all [3].")
@click.option("--update-table", is_flag=True,
              help="Compare the forms at many sizes and rewrite the table of auto.")  # fmt: skip
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False),
              help="Write everything measured here.")  # fmt: skip
def main(
    quick: bool,
    device: str,
    shapes: str | None,
    rounds: int | None,
    processes: int | None,
    update_table: bool,
    json_file: Path | None,
) -> None:
    """Compare all back ends of the experts with upstream's and with the matrix products alone."""
    if update_table and (quick or (processes or PROCESSES) < PROCESSES):
        raise click.UsageError(
            f"--update-table wants {PROCESSES} processes at least: drop --quick and --processes"
        )
    console = wide_console()
    job = _job(device, rounds, shapes, quick=quick, update_table=update_table)
    console.print(describe_machine(1))
    runs: list[dict[str, Any]] = []
    with console.status("starting") as status:
        for i in range(processes or (1 if quick else PROCESSES)):

            def on_line(line: str, i: int = i) -> None:
                status.update(f"process {i + 1}: measuring {line}")

            runs.append(measured_by("experts_process", job.as_json(), on_line))
    if update_table:
        _write_table(console, [run["points"] for run in runs], device)
    else:
        _show(console, [run["stages"] for run in runs])
    if json_file:
        json_file.write_text(json.dumps({"processes": runs}, indent=1))
        console.print(f"written: {json_file}")


def wide_console() -> Console:
    """A terminal as it is; in a file or pipe, wide enough for every column."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _job(
    device: str, rounds: int | None, shapes: str | None, *, quick: bool, update_table: bool
) -> ExpertsJob:
    if update_table:
        return ExpertsJob(device, list(DTYPES), rounds or 7, points=points_of(device))
    known = list(shapes_of(device))
    names = shapes.split(",") if shapes else QUICK_SHAPES[device] if quick else known
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
    tokens = QUICK_TOKENS if quick else TOKENS
    return ExpertsJob(
        device,
        list(DTYPES),
        rounds or (3 if quick else 5),
        shapes=names,
        tokens=CUDA_TOKENS if device == "cuda" else tokens,
    )


def _show(console: Console, runs: list[list[tables.Case]]) -> None:
    for dtype in DTYPES:
        console.print(tables.stage_table(runs, dtype))
    console.print(
        "speeds relative to upstream's SequentialMLP · limit = the same matrix products and "
        "activation into place, nothing else; of limit is that of auto · difference = largest of "
        "outputs and gradients, relative to the largest value · – = not timed: padding would make "
        f"it compute {MOST_PADDED} times as much · {WORKLOAD_NOTE}",
        style="dim",
    )


def _write_table(console: Console, runs: list[list[tables.Case]], device: str) -> None:
    rows = form_choice.findings(runs)
    file = form_choice.TABLE_FILE
    file.write_text(form_choice.written(file.read_text(), rows, device))
    console.print(tables.point_table(runs))
    console.print(tables.choice_table(rows))
    console.print(f"written: {file.name}")


if __name__ == "__main__":
    main()
