"""Our MoE layer beside upstream's own: same weights, same input, same process.

    python tools/bench/layer.py --quick

What makes the ratios hold up on a shared machine: the allocator is pinned by environment before
Python starts, one thread, CPU time, both sides in turns, the fastest of several rounds, outputs
and gradients compared before anything is timed, and the median over several processes.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from subprocess import PIPE
from typing import Any

import click
from rich.console import Console

from megatron_moe.tools.bench import tables
from megatron_moe.tools.bench.process import PINNED, Job
from megatron_moe.tools.bench.shapes import DTYPES, SHAPES
from megatron_moe.tools.bench.tables import Case

QUICK_SHAPES = ("olmoe/8", "dsv3/28")
TRAFFIC_SHAPE = "qwen3-30b/8"


class _Names(click.ParamType):
    """A comma-separated list of known names."""

    name = "names"

    def __init__(self, known: Sequence[str]) -> None:
        self.known = tuple(known)

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        names = tuple(value.split(",")) if isinstance(value, str) else tuple(value)
        if unknown := [name for name in names if name not in self.known]:
            self.fail(f"{', '.join(unknown)}: not one of {', '.join(self.known)}", param, ctx)
        return names


@click.command()
@click.option("--quick", is_flag=True, help="Two shapes, one process: under 90 s on a quiet core.")
@click.option("--shapes", type=_Names(SHAPES), help=f"Default: {','.join(SHAPES)}.")
@click.option("--dtypes", type=_Names(DTYPES), default=DTYPES, help="Default: fp32,bf16.")
@click.option("--rounds", type=click.IntRange(min=1), help="Of which the fastest counts [7].")
@click.option("--processes", type=click.IntRange(min=1), help="Repetitions of it all [3].")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True,
              help="More than one: wall time, meaningful on an idle machine only.")  # fmt: skip
@click.option("--gated", is_flag=True, help="SwiGLU experts instead of GELU ones; no goals.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False),
              help="Write everything measured here.")  # fmt: skip
def main(
    quick: bool,
    shapes: tuple[str, ...] | None,
    dtypes: tuple[str, ...],
    rounds: int | None,
    processes: int | None,
    threads: int,
    gated: bool,
    json_file: Path | None,
) -> None:
    """Compare the speed, memory and traffic of our MoE layer with upstream's, on the CPU."""
    console = Console()
    job = Job(
        shapes=list(shapes or (QUICK_SHAPES if quick else SHAPES)),
        dtypes=list(dtypes),
        rounds=rounds or (5 if quick else 7),
        phase_rounds=3 if quick else 5,
        threads=threads,
        gated=gated,
        sequential=not quick,
    )
    console.print(describe_machine(threads))
    runs: list[list[Case]] = []
    traffic: list[Case] = []
    with console.status("starting") as status:
        for i in range(processes or (1 if quick else 3)):
            # The counts are the same each time, and the times beside them are no goal: once.
            teams = [[job]] if i else [[job], two_ranks(job, dtypes[:1] if quick else dtypes)]

            def on_line(line: str, i: int = i) -> None:
                status.update(f"process {i + 1}: {line}")

            alone, *rest = run_process(teams, on_line)
            runs.append(alone)
            traffic += [case for team in rest for case in team]
    show(console, runs, traffic, gated=gated)
    if json_file:
        json_file.write_text(json.dumps({"processes": runs, "traffic": traffic}, indent=1))
        console.print(f"written: {json_file}")


def show(console: Console, runs: list[list[Case]], traffic: list[Case], *, gated: bool) -> None:
    """Print every table."""
    for dtype in dict.fromkeys(case["dtype"] for case in runs[0]):
        console.print(tables.speed_table(runs, dtype, gated=gated))
        console.print(tables.phase_table(runs, dtype))
    console.print(tables.held_table(runs))
    console.print(tables.traffic_table(traffic))
    console.print(
        "× = speed relative to upstream's layer (SequentialMLP, all-to-all dispatcher) · limit = "
        "matrix products of gate and experts, activation and its derivative, nothing else · "
        "difference = largest of output and gradients, relative to the largest value",
        style="dim",
    )


def two_ranks(job: Job, dtypes: Sequence[str]) -> list[Job]:
    """The team that measures the exchange of one shape."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alike = {"shapes": [TRAFFIC_SHAPE], "dtypes": list(dtypes), "sequential": False}
    place = {"world_size": 2, "port": port}
    return [replace(job, **alike, **place, rank=rank) for rank in range(2)]


def run_process(teams: Sequence[Sequence[Job]], on_line: Callable[[str], None]) -> list[list[Case]]:
    """Run a measuring process, with the allocator pinned.

    Args:
        teams: The jobs that run side by side, one team after another.
        on_line: Called as each case begins.

    Returns:
        The results of each team's rank 0.

    Raises:
        click.ClickException: It failed; its last lines are shown.
    """
    env = os.environ | PINNED | {"OMP_NUM_THREADS": str(teams[0][0].threads)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "teams").write_text(json.dumps([[asdict(job) for job in team] for team in teams]))
        command = [sys.executable, "-m", "megatron_moe.tools.bench.process", str(folder)]
        with (folder / "log").open("w") as log:
            # In a session of its own, its ranks can be ended with it.
            child = subprocess.Popen(
                command, env=env, stdout=PIPE, stderr=log, text=True, start_new_session=True
            )
            try:
                for line in iter(child.stdout.readline, ""):  # type: ignore[union-attr]
                    if line.startswith("measuring "):
                        on_line(line.strip())
                child.wait()
            except BaseException:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                raise
        if child.returncode != 0:
            last = (folder / "log").read_text().splitlines()[-25:]
            raise click.ClickException("\n".join(["the measuring process failed:", *last]))
        return [json.loads((folder / f"results{i}").read_text()) for i in range(len(teams))]


def describe_machine(threads: int) -> str:
    """One line that says what the figures were measured on."""
    cpu_file = Path("/proc/cpuinfo")
    lines = cpu_file.read_text().splitlines() if cpu_file.exists() else []
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), None)
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{os.cpu_count()} cores of {model or platform.machine()}, {threads} used, {load} · "
        f"torch {version('torch')}, megatron-core {version('megatron-core')}, "
        f"megatron-moe {version('megatron-moe')}"
    )


if __name__ == "__main__":
    main()
