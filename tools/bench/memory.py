"""Where the memory of a training step goes, and what each recompute setting saves and costs.

    python tools/bench/memory.py --quick

A GPT whose layers are all MoE layers is trained one step in each setting, with the same weights, in
one process; losses and gradients are compared first. Bytes are counted by a dispatch mode that sees
every storage being made and freed (``live_bytes``): weights, their gradients and optimizer state
are not in them, and what the allocator adds is not either; on CUDA its own peak is shown beside
them. They are the same on every run. Step times are taken in turns, the fastest of several rounds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.table import Table

from megatron_moe.tools.bench.child import measured_by
from megatron_moe.tools.bench.experts import wide_console
from megatron_moe.tools.bench.layer import describe_machine
from megatron_moe.tools.bench.live_bytes import REST
from megatron_moe.tools.bench.memory_process import NONE, SETTINGS, UPSTREAM, MemoryJob

PHASES = ("route", "dispatch", "experts", "combine", REST)
CLAIM = 0.60  # what the literature says that a checkpoint every 4 layers saves
Account = dict[str, Any]


@click.command()
@click.option("--quick", is_flag=True, help="Few tokens, one process: under 90 s.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--layers", type=click.IntRange(min=4), default=8, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), help="Of which the fastest counts [5].")
@click.option("--processes", type=click.IntRange(min=1), help="Repetitions of it all [3].")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False),
              help="Write everything measured here.")  # fmt: skip
def main(
    quick: bool,
    device: str,
    layers: int,
    rounds: int | None,
    processes: int | None,
    json_file: Path | None,
) -> None:
    """Account for the memory of a training step, by phase and by recompute setting."""
    console = wide_console()
    size = {"sequence": 128, "batch": 2} if quick else {"sequence": 256, "batch": 4}
    job = MemoryJob(device, rounds or (3 if quick else 5), **size, layers=layers)
    console.print(describe_machine(1))
    runs: list[dict[str, Account]] = []
    with console.status("starting") as status:
        for i in range(processes or (1 if quick else 3)):

            def on_line(line: str, i: int = i) -> None:
                status.update(f"process {i + 1}: {line}")

            runs.append(measured_by("memory_process", job.as_json(), on_line))
    console.print(
        f"{job.layers} layers, hidden {job.hidden}, {job.experts} SwiGLU experts of {job.ffn}, "
        f"top-{job.topk}, {job.batch} × {job.sequence} tokens, fp32; unfused attention"
    )
    console.print(phase_table(runs[0]))
    console.print(setting_table(runs))
    console.print(claim(runs[0], job.layers))
    if json_file:
        json_file.write_text(json.dumps({"processes": runs}, indent=1))
        console.print(f"written: {json_file}")


def phase_table(found: Mapping[str, Account]) -> Table:
    """What each phase of our layer leaves for backward, and how far it rises while it runs."""
    settings = [name for name in found if name != UPSTREAM]
    table = _table(
        "MiB that each phase leaves for backward, all layers (most that it adds while it runs, "
        "one layer)",
        "recompute", *(p if p != REST else "attention, norms, loss" for p in PHASES),
        "held by forward", "forward peak", "backward peak",
    )  # fmt: skip
    for name in settings:
        account = found[name]
        held, rises = account["held"], account["rises"]
        table.add_row(
            name,
            *(
                _mib(held.get(p, 0)) + (f" ({_mib(rises[p])})" if p in rises else "")
                for p in PHASES
            ),
            _mib(sum(held.values())),
            _mib(account["forward_peak"]),
            _mib(account["backward_peak"]),
        )
    return table


def setting_table(runs: Sequence[Mapping[str, Account]]) -> Table:
    """Each setting beside none: bytes, and the price in time."""
    with_allocator = "allocator_peak" in runs[0][NONE]
    table = _table(
        "recompute settings", "recompute", "held MiB", "saved", "peak MiB", "saved",
        *(["allocator's peak MiB"] if with_allocator else []), "step time ×", "flags",
    )  # fmt: skip
    base = runs[0][NONE]
    for name, account in runs[0].items():
        times = [run[name]["seconds"] / run[NONE]["seconds"] for run in runs]
        spread = f" ({min(times):.2f}–{max(times):.2f})" if len(times) > 1 else ""
        table.add_row(
            name,
            _mib(held(account)),
            f"{saved(account, base, held):.0%}",
            _mib(peak(account)),
            f"{saved(account, base, peak):.0%}",
            *([_mib(account["allocator_peak"])] if with_allocator else []),
            f"{median(times):.2f}{spread}" if name != NONE else "1",
            SETTINGS[name].flags,
        )
    return table


def claim(found: Mapping[str, Account], layers: int) -> str:
    """What there is to say about a checkpoint every 4 layers."""
    of_held, of_peak = (saved(found["every 4 layers"], found[NONE], by) for by in (held, peak))
    verdict = "holds" if of_peak >= CLAIM else "does not hold"
    return (
        f"a checkpoint every 4 layers is said to save {CLAIM:.0%}: at {layers} layers it saves "
        f"{of_held:.0%} of what forward holds and {of_peak:.0%} of the peak; for the peak, which "
        f"decides what fits, the claim {verdict} here"
    )


def held(account: Account) -> int:
    """Bytes at the end of forward."""
    return sum(account["held"].values())


def peak(account: Account) -> int:
    """Most bytes at any time of the step."""
    return max(account["forward_peak"], account["backward_peak"])


def saved(account: Account, base: Account, by: Any) -> float:
    """Share of the base's bytes."""
    return 1 - by(account) / by(base)


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in ("recompute", "flags") else "right")
    return table


if __name__ == "__main__":
    main()
