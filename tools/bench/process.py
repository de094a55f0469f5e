"""One measuring process; ``layer.py`` starts it, with the allocator pinned, and reads its results.

    python -m megatron_moe.tools.bench.process FOLDER

It imports Megatron once, then forks a team of ranks for each entry of FOLDER/teams, one team after
another; rank 0 of team i writes FOLDER/results<i>. A line is printed for each case as it begins.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

# glibc gives large blocks back to the kernel on free, and every step would fault them in again:
# page faults would be measured, which favours whoever allocates less, by up to 1.6 times.
PINNED = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


@dataclass(frozen=True, slots=True)
class Job:
    """What a process measures.

    Args:
        shapes: Names of shapes.
        dtypes: ``fp32``, ``bf16``.
        rounds: Of which the fastest counts.
        phase_rounds: The same for the phases.
        threads: Of each process.
        gated: SwiGLU experts instead of GELU ones.
        sequential: Measure our sequential experts too.
        rank: Place in the expert-parallel world.
        world_size: 1, or 2 to measure the exchange.
        port: Where rank 0 listens, for two ranks.
    """

    shapes: list[str]
    dtypes: list[str]
    rounds: int
    phase_rounds: int
    threads: int = 1
    gated: bool = False
    sequential: bool = True
    rank: int = 0
    world_size: int = 1
    port: int = 0


def main(folder: Path) -> None:
    """Run the teams of a folder.

    Raises:
        RuntimeError: The environment was not set before Python started, or a rank failed.
    """
    teams = [[Job(**one) for one in team] for team in json.loads((folder / "teams").read_text())]
    expected = PINNED | {"OMP_NUM_THREADS": str(teams[0][0].threads)}
    wrong = [name for name, value in expected.items() if os.environ.get(name) != value]
    if wrong:
        raise RuntimeError(f"{', '.join(wrong)} must be set before Python starts: use layer.py")
    from megatron_moe.activate import activate

    fork = multiprocessing.get_context("fork")
    with activate("cpu"):
        from megatron_moe.tools.bench import sides  # noqa: F401  (imported once, before the forks)

        for i, team in enumerate(teams):
            results = folder / f"results{i}"
            _run_team([fork.Process(target=measure, args=(job, results)) for job in team])


def _run_team(ranks: list[Any]) -> None:
    """Run ranks to their end; when one fails the others, which would wait for it, are ended."""
    for rank in ranks:
        rank.start()
    while running := [rank for rank in ranks if rank.exitcode is None]:
        wait([rank.sentinel for rank in running])
        if any(rank.exitcode for rank in ranks):
            for rank in running:
                rank.kill()
            raise RuntimeError("a rank failed; its error stands above")


def refuse_if_different(
    differences: dict[str, float], shape: str, dtype: str, tolerance: float
) -> None:
    """Check that all sides compute the same.

    Raises:
        ValueError: One differs from upstream by more than ``tolerance``, or is not a number.
    """
    for side, worst in differences.items():
        if not worst <= tolerance:
            raise ValueError(
                f"{shape} {dtype}: outputs or gradients of '{side}' differ from upstream's by "
                f"{worst:.1e} of their largest value, more than {tolerance:.0e}; not timed"
            )


def measure(job: Job, results_file: Path) -> None:
    """Measure the cases of a job, one after another.

    Raises:
        ValueError: The two sides differ by more than rounding, so times would mean nothing.
    """
    import torch

    from megatron_moe.tools.bench.sides import enter_world

    torch.set_num_threads(job.threads)
    enter_world(job.rank, job.world_size, job.port)
    results = []
    for dtype in job.dtypes:
        for name in job.shapes:
            print(f"measuring {name} {dtype}", flush=True)
            results.append({"shape": name, "dtype": dtype} | _case(job, name, dtype))
    torch.distributed.destroy_process_group()
    if job.rank == 0:
        results_file.write_text(json.dumps(results))


def _case(job: Job, name: str, dtype: str) -> dict[str, Any]:
    from megatron_moe.tools.bench import sides as bench_sides
    from megatron_moe.tools.bench.clock import clock_for
    from megatron_moe.tools.bench.shapes import SHAPES
    from megatron_moe.tools.bench.traffic import all_agree, measure_traffic

    shape, clock = SHAPES[name], clock_for(job.threads)
    sides = bench_sides.build_sides(shape, dtype, gated=job.gated, sequential=job.sequential)
    differences = {
        side: all_agree(value) for side, value in bench_sides.largest_differences(sides).items()
    }
    refuse_if_different(differences, name, dtype, bench_sides.TOLERANCE[dtype])
    if job.world_size > 1:
        traffic = measure_traffic(sides, job.phase_rounds, clock)
        return {"differences": differences, "traffic": traffic}
    return {"differences": differences} | _alone(job, sides, shape, dtype)


def _alone(job: Job, sides: Any, shape: Any, dtype: str) -> dict[str, Any]:
    from megatron_moe.tools.bench.clock import clock_for, fastest_in_turns
    from megatron_moe.tools.bench.held import held_bytes
    from megatron_moe.tools.bench.limit import matmul_limit
    from megatron_moe.tools.bench.phases import time_phases
    from megatron_moe.tools.bench.shapes import minimum_held_bytes

    clock = clock_for(job.threads)
    rows_e = sides.layers["ours"].router(sides.x_SBD).tokens_per_expert().tolist()
    limit = matmul_limit(shape, sides.x_SBD.dtype, rows_e, gated=job.gated)
    steps = {name: sides.step(name) for name in sides.layers} | {"limit": limit}
    held = {name: held_bytes(sides.layers[name], sides.x_SBD) for name in ("upstream", "ours")}
    return {
        "seconds": fastest_in_turns(steps, job.rounds, clock),
        "phases": time_phases(sides, job.phase_rounds, clock),
        "held": held | {"minimum": minimum_held_bytes(shape, dtype, gated=job.gated)},
        "rows_of_experts": [min(rows_e), max(rows_e)],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
