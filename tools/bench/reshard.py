"""The offline resharder beside a plain copy, and beside Megatron's own load and save.

    python tools/bench/reshard.py --quick

A made-up MoE checkpoint with optimizer in three forms; each case runs in turns with `cp -r` of the
same source, all in processes of their own, sources out of the page cache, targets forced to disk.
A ratio is of two runs of the same round, and what is shown is the median over rounds: on a shared
machine seconds drift, ratios much less.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
from rich.console import Console

from megatron_moe.tools.bench.layer import describe_machine
from megatron_moe.tools.bench.reshard_table import Row, cost_table
from megatron_moe.tools.bench.synthetic import ITERATION, Model, make
from megatron_moe.tools.bench.watch import Cost, cool, size_of, watch
from megatron_moe.tools.checkpoint.model.layout import Layout
from megatron_moe.tools.checkpoint.read.locate import folder_name

_COMMAND = [sys.executable, "-c", "from megatron_moe.cli import main; main()"]
_QUIET = ["--progress", "none"]
_COPY = 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} +'  # sync FILE: fsync, of it alone
_GIGA = 1e9

# Forms of the source: format, layout, optimizer.
SOURCES = {
    "torch_dist": ("torch_dist", Layout(tp=2, ep=2, etp=1, dp=2), "fully"),
    "torch": ("torch", Layout(tp=2, pp=2, ep=2, etp=1, dp=2), "keep"),
    "dp": ("torch_dist", Layout(tp=2, ep=2, etp=1, dp=2), "dp"),
}


@dataclass(frozen=True)
class Case:
    """One thing to do.

    Args:
        name: Shown.
        source: Which of the sources.
        options: Of ``reshard``.
        rewrites: Whether all bytes change; else metadata alone.
        load_save: Whether Megatron's load and save is a peer.
    """

    name: str
    source: str
    options: tuple[str, ...]
    rewrites: bool = True
    load_save: bool = False


CASES = (
    Case("torch_dist TP2 → TP4·ETP2", "torch_dist", ("--tp", "4", "--etp", "2"), load_save=True),
    Case("torch TP2·PP2·EP2 → torch_dist", "torch", ("--format", "torch_dist", "--pp", "1")),
    Case("torch_dist → torch TP4", "torch_dist", ("--format", "torch", "--tp", "4")),
    Case("dp_reshardable → fully_reshardable", "dp", ("--optim", "fully")),
    Case("torch_dist EP2 → EP4, metadata", "torch_dist", ("--ep", "4"), rewrites=False),
)


@dataclass
class Bench:
    """A run of the benchmark.

    Args:
        folder: For everything that is written.
        model: Sizes.
        rounds: Turns of each case.
        workers: Processes of the resharder; None for its default.
    """

    folder: Path
    model: Model
    rounds: int
    workers: int | None = None
    made: dict[str, Path] = field(default_factory=dict)

    def source(self, name: str) -> Path:
        """Return a source, made at its first use."""
        if name not in self.made:
            folder = self.folder / name
            form, layout, optimizer = SOURCES[name]
            make(folder, self.model, layout, form, optimizer)
            self.made[name] = folder
        return self.made[name]

    def run(self, case: Case) -> Row:
        """Measure one case and its peers in turns."""
        source = self.source(case.source)
        costs: dict[str, list[Cost]] = {}
        sides = ["cp", "ours"] if case.rewrites else ["ours"]
        sides += ["load+save"] if case.load_save else []
        for _ in range(self.rounds):
            for side in sides:
                costs.setdefault(side, []).append(self._once(side, case, source))
        return Row(case.name, size_of(source), case.rewrites, costs)

    def _once(self, side: str, case: Case, source: Path) -> Cost:
        out = self.folder / "out"
        cool(source)
        try:
            if side == "cp":
                return watch(["sh", "-c", _COPY, str(source), str(out)])
            if side == "load+save":
                return self._load_save(source / folder_name(ITERATION), out)
            workers = ["--workers", str(self.workers)] if self.workers else []
            options = [*case.options, *workers, *_QUIET]
            return watch([*_COMMAND, "reshard", str(source), str(out), *options])
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def _load_save(self, source: Path, out: Path) -> Cost:
        module = "megatron_moe.tools.bench.load_save"
        env = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
        cost = watch([sys.executable, "-m", module, str(source), str(out)], env)
        inside = re.search(r"^seconds ([\d.]+)", cost.output, re.MULTILINE)
        assert inside, cost.output
        return Cost(**(asdict(cost) | {"seconds": float(inside[1])}))

    def commands(self) -> list[Row]:
        """Measure commands that change nothing."""
        source = self.source("torch_dist")
        rows = []
        for name, arguments in (
            ("inspect --help", ["--help"]), ("inspect", [str(source)])
        ):  # fmt: skip
            costs = [watch([*_COMMAND, "inspect", *arguments]) for _ in range(self.rounds)]
            rows.append(Row(name, 0, False, {"ours": costs}))
        return rows


@contextmanager
def _work_folder(folder: Path | None, keep: bool) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="reshard-bench-", dir=folder))
    try:
        yield path
    finally:
        if not keep:
            shutil.rmtree(path, ignore_errors=True)


@click.command()
@click.option("--quick", is_flag=True, help="0.4 GB, one round, no load+save: under a minute.")
@click.option("--gigabytes", type=click.FloatRange(min=0.001), help="Size of the source [4].")
@click.option("--rounds", type=click.IntRange(min=1), help="Turns of each case [3].")
@click.option("--workers", type=click.IntRange(min=1), help="Of the resharder; its default.")
@click.option("--cases", help="Numbers of cases, as 1,5; all by default.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False, exists=True),
              help="Where to write, on the disk to be measured; the temporary folder.")  # fmt: skip
@click.option("--keep", is_flag=True, help="Leave the sources there.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False),
              help="Write everything measured here.")  # fmt: skip
def main(
    quick: bool,
    gigabytes: float | None,
    rounds: int | None,
    workers: int | None,
    cases: str | None,
    folder: Path | None,
    keep: bool,
    json_file: Path | None,
) -> None:
    """Time the resharder beside `cp -r` and beside Megatron's load and save."""
    # A pipe or a log has no width of its own: the table's.
    console = Console(width=None if sys.stdout.isatty() else 150)
    model = Model.of_bytes((gigabytes or (0.4 if quick else 4)) * _GIGA)
    rounds = rounds or (1 if quick else 3)
    chosen = [CASES[number - 1] for number in _numbers(cases)]
    if quick:
        chosen = [Case(c.name, c.source, c.options, c.rewrites) for c in chosen]
    console.print(describe_machine(workers or min(os.cpu_count() or 1, 4)))
    rows: list[Row] = []
    with _work_folder(folder, keep) as place, console.status("starting") as status:
        bench = Bench(place, model, rounds, workers)
        for case in chosen:
            status.update(f"{case.name}, in {place}")
            rows.append(bench.run(case))
            seconds = {
                side: [round(cost.seconds, 1) for cost in costs]
                for side, costs in rows[-1].costs.items()
            }
            console.print(f"{case.name}: {seconds}", style="dim", highlight=False)
        status.update("commands")
        rows += bench.commands()
    console.print(cost_table(rows, str(model)))
    console.print(_LEGEND, style="dim")
    if keep:
        console.print(f"kept: {place}")
    if json_file:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1))
        console.print(f"written: {json_file}")


def _numbers(text: str | None) -> list[int]:
    if text is None:
        return list(range(1, len(CASES) + 1))
    known = [str(number) for number in range(1, len(CASES) + 1)]
    wanted = [word.strip() for word in text.split(",")]
    if wrong := [word for word in wanted if word not in known]:
        raise click.BadParameter(
            f"{', '.join(wrong)}: not one of {', '.join(known)}", param_hint="--cases"
        )
    return [int(word) for word in wanted]


_LEGEND = (
    "× cp: seconds ÷ those of cp -r and fsync of the copy in the same round · ÷ load+save: its "
    "seconds (imports not counted) ÷ ours (everything counted) · sources dropped from the page "
    "cache by posix_fadvise before each run · private: peak of anonymous memory of all processes · "
    "read ×: bytes asked of files ÷ bytes of the source"
)


if __name__ == "__main__":
    main()
