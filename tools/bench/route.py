"""Our router beside a naive loop over experts and beside upstream's own.

    python tools/bench/route.py --quick

Router time is gate, choice and losses, forward and backward, up to where a dispatcher can start
(``route_sides`` says what that is on each side). The gate is a matrix product that no side can do
faster than another; so that it hides nothing, everything is measured with and without it.

The figures are made as in ``layer.py``: allocator pinned before Python starts, one thread, CPU
time, sides in turns, the fastest of several rounds, results compared before anything is timed, and
the median over several processes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from megatron_moe.tools.bench.child import measured_by
from megatron_moe.tools.bench.layer import describe_machine
from megatron_moe.tools.bench.route_case import KINDS, TOKENS, TOPK, RouteCase, RouteJob
from megatron_moe.tools.bench.route_table import NOTES, Result, route_table


class _Numbers(click.ParamType):
    """A comma-separated list of positive numbers."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        try:
            numbers = tuple(int(n) for n in value.split(",")) if isinstance(value, str) else value
        except ValueError:
            self.fail(f"{value}: not whole numbers with commas between", param, ctx)
        if any(number < 1 for number in numbers):
            self.fail(f"{value}: must be positive", param, ctx)
        return numbers


@click.command()
@click.option("--quick", is_flag=True, help="One process: under 90 s on a quiet core.")
@click.option("--kind", type=click.Choice(list(KINDS)), default="topk", show_default=True,
              help="; ".join(f"{k}: {v}" for k, v in KINDS.items()))  # fmt: skip
@click.option("--experts", type=_Numbers(), default=tuple(TOPK), help="Default: 8,64,256.")
@click.option("--tokens", type=_Numbers(), default=TOKENS, help="Default: 4096,32768.")
@click.option("--hidden", type=click.IntRange(min=1), default=1024, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1),
              help="Of which the fastest counts; above 4,096 tokens half as many [7].")  # fmt: skip
@click.option("--processes", type=click.IntRange(min=1), help="Repetitions of it all [3].")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False),
              help="Write everything measured here.")  # fmt: skip
def main(
    quick: bool,
    kind: str,
    experts: tuple[int, ...],
    tokens: tuple[int, ...],
    hidden: int,
    rounds: int | None,
    processes: int | None,
    json_file: Path | None,
) -> None:
    """Compare our router's time with a naive loop's and with upstream's, on the CPU."""
    console = Console()
    cases = [RouteCase(kind, t, e, topk_of(e), hidden) for t in tokens for e in experts]
    job = RouteJob(cases, rounds or (4 if quick else 7))
    console.print(describe_machine(1))
    runs: list[list[Result]] = []
    with console.status("starting") as status:
        for i in range(processes or (1 if quick else 3)):

            def on_line(line: str, i: int = i) -> None:
                if line.startswith("measuring "):
                    status.update(f"process {i + 1}: {line}")

            runs.append(measured_by("route_process", job.as_json(), on_line))
    console.print(route_table(runs, kind))
    console.print(NOTES, style="dim")
    if json_file:
        json_file.write_text(json.dumps({"processes": runs}, indent=1))
        console.print(f"written: {json_file}")


def topk_of(experts: int) -> int:
    """Experts of a token, as models of that many have it."""
    return TOPK.get(experts, 2 if experts < 32 else 8) if experts > 1 else 1


if __name__ == "__main__":
    main()
