"""One measuring process of the router benchmark; ``route.py`` starts it with the allocator pinned.

    python -m megatron_moe.tools.bench.route_process FOLDER

Measures the cases of FOLDER/job, one after another, into FOLDER/results. A line is printed for
each as it begins.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe.tools.bench.child import refuse_unpinned
from megatron_moe.tools.bench.clock import clock_for, fastest_in_turns
from megatron_moe.tools.bench.process import refuse_if_different
from megatron_moe.tools.bench.route_case import PARTS, RouteCase, RouteJob

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_moe.tools.bench.route_sides import Routers

TOLERANCE = 1e-4  # of the largest value; sums over tokens differ in their order


def main(folder: Path) -> None:
    """Measure the job of a folder.

    Raises:
        RuntimeError: The environment was not set before Python started.
        ValueError: Sides compute different things, so times would mean nothing.
    """
    refuse_unpinned("route.py")
    job = RouteJob.from_json(json.loads((folder / "job").read_text()))
    from megatron_moe.activate import activate

    with activate("cpu"):
        import torch

        from megatron_moe.tools.bench.sides import enter_world

        torch.set_num_threads(1)
        enter_world()
        results = []
        for case in job.cases:
            print(f"measuring {case.name}", flush=True)
            results.append(measure(case, job.rounds_of(case)))
        torch.distributed.destroy_process_group()
    (folder / "results").write_text(json.dumps(results))


def measure(case: RouteCase, rounds: int) -> dict[str, Any]:
    """Compare all sides, then time them in turns.

    Returns:
        ``seconds`` by part and side, of the ``gate`` alone, and the ``differences`` to upstream.

    Raises:
        ValueError: Sides compute different things.
    """
    from megatron_moe.tools.bench.route_sides import Routers

    found: dict[str, Any] = {"kind": case.kind, "name": case.name, "seconds": {}}
    worst: dict[str, float] = {}
    for part in PARTS:
        routers = Routers(case, gated=part == "whole")
        for name, difference in differences(routers).items():
            worst[name] = max(worst.get(name, 0.0), difference)
        refuse_if_different(worst, case.name, case.kind, TOLERANCE)
        steps = {name: routers.step(name) for name in routers.forward}
        if part == "whole":
            steps["gate"] = routers.gate
        found["seconds"][part] = fastest_in_turns(steps, rounds, clock_for(1))
    found["gate"] = found["seconds"]["whole"].pop("gate")
    return found | {"differences": worst}


def differences(routers: Routers) -> dict[str, float]:
    """Largest difference of each side to upstream, relative to the largest value of each result.

    Compared are the weights as ``(T, E)``, which are zero where an expert was not chosen, the
    counts, and the gradients of the input and of the gate; without the gate also the gradient of
    the losses alone.
    """
    expected = _results(routers, "upstream")
    worst = {}
    for name in routers.forward:
        if name == "upstream":
            continue
        found = _results(routers, name)
        worst[name] = max(_difference(found[key], value) for key, value in expected.items())
    return worst


def _difference(found: Tensor, expected: Tensor) -> float:
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    # A maximum of several would lose a NaN.
    return difference if difference == difference else float("inf")


def _results(routers: Routers, name: str) -> dict[str, Tensor]:
    import torch

    ended = routers.forward[name]()
    found = {"weights": ended.dense(routers.grad_TE.shape), "counts": ended.counts_E.float()}
    routers.step(name)()
    assert routers.input.grad is not None
    found["input"] = routers.input.grad
    gate = routers.gate_gradient(name)
    if gate is not None:
        return found | {"gate": gate}
    routers.step(name, torch.zeros_like(routers.grad_TE))()
    return found | {"losses": routers.input.grad}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
