"""The story: options, text, runs, table, picture, findings."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_moe.tools.demo.child import termination_as_interrupt
from megatron_moe.tools.study.compare import Study
from megatron_moe.tools.study.picture import draw
from megatron_moe.tools.study.plan import Plan
from megatron_moe.tools.study.subject import Subject
from megatron_moe.tools.study.tables import console_table, spoken, write_csv, write_json

if TYPE_CHECKING:
    from megatron_moe.tools.study.history import Run
    from megatron_moe.tools.study.text import Text
    from megatron_moe.tools.study.workers import Job

_PIPE_WIDTH = 140


class _Names(click.ParamType):
    """A comma-separated list of variants."""

    name = "names"

    def __init__(self, known: Collection[str]) -> None:
        self.known = known

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        names = tuple(value.split(",")) if isinstance(value, str) else tuple(value)
        if unknown := [name for name in names if name not in self.known]:
            self.fail(f"{', '.join(unknown)}: not one of {', '.join(self.known)}", param, ctx)
        return names


def study_command(subject: Subject) -> click.Command:
    """The command that makes a study, from its options to its picture."""
    full = subject.full

    @click.command(subject.name.replace("_", "-"), help=subject.says)
    @click.option("--quick", is_flag=True, help=subject.quick_says)
    @click.option("--variants", type=_Names(subject.variants), metavar="NAME,…",
                  help="Only these, and what they are compared with.")  # fmt: skip
    @click.option("--steps", type=click.IntRange(min=2), help=f"Updates of a run [{full.steps}].")
    @click.option("--seeds", type=click.IntRange(1, 11),
                  help=f"Runs of each variant [{full.seeds}].")  # fmt: skip
    @click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True,
                  help="Processes, one thread each.")  # fmt: skip
    @click.option("--resume", is_flag=True,
                  help="Use the finished runs in the same folder; not after an edit.")  # fmt: skip
    @click.option("--out", "folder", type=click.Path(path_type=Path, file_okay=False),
                  default=Path("runs") / subject.name, show_default=True,
                  help="Where text, table and picture go.")  # fmt: skip
    def command(
        quick: bool,
        variants: tuple[str, ...] | None,
        steps: int | None,
        seeds: int | None,
        workers: int,
        resume: bool,
        folder: Path,
    ) -> None:
        base = subject.quick if quick else subject.full
        plan = asked_plan(subject, base, variants, steps, seeds)
        _make_study(subject, plan, folder, workers, resume)

    return command


def _make_study(subject: Subject, plan: Plan, folder: Path, workers: int, resume: bool) -> None:
    console = _console()
    if importlib.util.find_spec("matplotlib") is None:  # now, not when all the runs are made
        raise click.ClickException(
            "the picture needs matplotlib: pip install 'megatron-moe[study]', or pip install "
            "matplotlib"
        )
    started = time.monotonic()
    try:
        with termination_as_interrupt():
            runs = _make_runs(subject, plan, folder, workers, resume, console)
    except KeyboardInterrupt:
        console.print(f"\nstopped; finished runs are in {folder / 'runs'}, for --resume")
        raise SystemExit(130) from None
    _tell(Study(runs, subject), plan, folder, console)
    console.print(f"[dim]{time.monotonic() - started:.0f} s in all[/dim]")


def _console() -> Console:
    """A console that does not squeeze the table into a pipe's 80 columns."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _PIPE_WIDTH)
    return console


def asked_plan(
    subject: Subject,
    base: Plan,
    variants: tuple[str, ...] | None,
    steps: int | None,
    seeds: int | None,
) -> Plan:
    """Return ``base`` with the user's changes, and each variant's controls beside it."""
    chosen = subject.with_controls(variants or base.chosen or tuple(subject.variants))
    steps = steps or base.steps
    return replace(
        base,
        chosen=tuple(chosen),
        steps=steps,
        seeds=seeds or base.seeds,
        measurements=max(2, min(base.measurements, steps)),
    )


def _make_runs(
    subject: Subject, plan: Plan, folder: Path, workers: int, resume: bool, console: Console
) -> list[Run]:
    console.print(f"[bold]1/3  Megatron on this CPU, and the text[/bold] → {folder}")
    from megatron_moe.activate import activate
    from megatron_moe.tools.study.workers import quiet

    with activate("cpu"), quiet():
        text = _text(plan, folder)
        # Imported once, before the forks.
        from megatron_moe.tools.study import train  # noqa: F401
        from megatron_moe.tools.study.kept import find, keep
        from megatron_moe.tools.study.workers import Job

        # Seed by seed: a run that is stopped for want of patience has compared everything once.
        seeds = range(1, plan.seeds + 1)
        wanted = [Job(subject.variants[name], seed) for seed in seeds for name in plan.chosen]
        found = [find(folder, plan, job.variant, job.seed) for job in wanted] if resume else []
        runs = [run for run in found if run is not None]
        there = {(run.variant, run.seed) for run in runs}
        jobs = [job for job in wanted if (job.variant.name, job.seed) not in there]
        console.print(
            f"\n[bold]2/3  {len(jobs)} runs of {plan.steps} steps[/bold]: {len(plan.chosen)} "
            f"variants, {plan.seeds} seed{'s' * (plan.seeds > 1)}, {workers} processes"
            + (f"; {len(runs)} more are kept from before" if runs else "")
        )
        for run in _followed(jobs, plan, text, workers, console):
            keep(folder, plan, subject.variants[run.variant], run)
            runs.append(run)
        return runs


def _text(plan: Plan, folder: Path) -> Text:
    from megatron_moe.tools.data.progress import shown
    from megatron_moe.tools.data.sources import DataError
    from megatron_moe.tools.study.text import make_text

    try:
        with shown("plain") as progress:
            return make_text(plan, folder / "text", progress)
    except (DataError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def _followed(
    jobs: list[Job], plan: Plan, text: Text, workers: int, console: Console
) -> Iterator[Run]:
    """Make the runs and show how far they are: a bar on a terminal, a line a run anywhere."""
    from megatron_moe.tools.study.history import Run
    from megatron_moe.tools.study.workers import run_all

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    done = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(jobs) * plan.steps)
        for event in run_all(jobs, plan, text, workers):
            if not isinstance(event, Run):
                bar.advance(task, event.count)
                continue
            done += 1
            console.print(
                f"  {done:>3}/{len(jobs)}  {event.variant:<18} seed {event.seed}  "
                f"validation loss {event.points[-1].loss:.4f}  {event.seconds:.0f} s"
            )
            yield event


def _tell(study: Study, plan: Plan, folder: Path, console: Console) -> None:
    found = study.subject.findings(study, plan)
    console.print("\n[bold]3/3  What came out[/bold]")
    console.print(console_table(study, plan), "")
    console.print(spoken(found), soft_wrap=True, markup=False)
    write_csv(folder / "table.csv", study, plan)
    write_json(folder / "study.json", study, plan, found, _made_with())
    draw(study, plan, [folder / "picture.png", folder / "picture.svg"])
    console.print(
        f"\n{folder}: picture.png, picture.svg, table.csv, study.json (every measurement)"
    )


def _made_with() -> dict[str, Any]:
    packages = {name: version(name) for name in ("megatron-moe", "megatron-core", "torch")}
    machine = {"machine": platform.machine(), "cores": os.cpu_count()}
    return packages | machine | {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}
