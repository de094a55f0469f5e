"""One measuring process of the experts benchmark; ``experts.py`` starts it, allocator pinned.

    python -m megatron_moe.tools.bench.experts_process FOLDER

Measures the job of FOLDER/job into FOLDER/results. A line is printed for each case as it begins.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_moe.tools.bench.child import refuse_unpinned
from megatron_moe.tools.bench.clock import Clock, clock_for, fastest_in_turns
from megatron_moe.tools.bench.experts_case import (
    GROUPED,
    LIMIT,
    MOST_PADDED,
    WORKLOADS,
    ExpertsJob,
    Point,
    shapes_of,
)
from megatron_moe.tools.bench.process import refuse_if_different

FORMS = tuple(form for form in GROUPED if form != "auto")


def main(folder: Path) -> None:
    """Measure the job of a folder.

    Raises:
        RuntimeError: The environment was not set before Python started.
        ValueError: Sides compute different things, so times would mean nothing.
    """
    refuse_unpinned("experts.py")
    job = ExpertsJob.from_json(json.loads((folder / "job").read_text()))
    import torch

    torch.set_num_threads(1)
    found = {"points": list(_points(job)), "stages": list(_stages(job)) if job.shapes else []}
    (folder / "results").write_text(json.dumps(found))


def device_clock(device: str) -> Clock:
    """CPU time on a CPU; on a GPU wall time of finished work."""
    if device == "cpu":
        return clock_for(1)
    import torch

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def _stages(job: ExpertsJob) -> Iterator[dict[str, Any]]:
    from megatron_moe.activate import activate

    with activate("cuda" if job.device == "cuda" else "cpu"):
        import torch

        from megatron_moe.tools.bench.experts_sides import Experts
        from megatron_moe.tools.bench.sides import TOLERANCE, enter_world

        enter_world()
        for dtype in job.dtypes:
            for shape in (shapes_of(job.device)[name] for name in job.shapes):
                experts = Experts(shape, dtype, job.device)
                for workload in job.workloads:
                    print(f"{shape.name} {dtype} {workload}", flush=True)
                    rows_e = WORKLOADS[workload](job.tokens * shape.topk, shape.num_experts)
                    case = {"shape": shape.name, "dtype": dtype, "workload": workload}
                    work = experts.workload(rows_e)
                    differences = work.differences()
                    refuse_if_different(
                        differences, f"{shape.name}, {workload},", dtype, TOLERANCE[dtype]
                    )
                    yield case | {"differences": differences} | _stage(experts, work, job)
        torch.distributed.destroy_process_group()


def _stage(experts: Any, work: Any, job: ExpertsJob) -> dict[str, Any]:
    rows_e = work.rows_e.tolist()
    timed = [name for name in experts.modules if name != "batched" or not too_padded(rows_e)]
    steps = {name: work.step(name) for name in timed} | {LIMIT: work.limit()}
    return {
        "rows": [min(rows_e), sum(rows_e) / len(rows_e), max(rows_e)],
        "missing": experts.missing,
        "auto": _auto_takes(experts, rows_e),
        "seconds": fastest_in_turns(steps, job.rounds, device_clock(job.device)),
    }


def too_padded(rows_e: list[int]) -> bool:
    """Whether padding to the fullest expert multiplies the work so much that nobody would."""
    return max(rows_e) * len(rows_e) > MOST_PADDED * sum(rows_e)


def _auto_takes(experts: Any, rows_e: list[int]) -> str:
    from megatron_moe.experts.grouped_gemm import choose_form

    weight = experts.modules["auto"].linear_fc1.weight
    return choose_form("auto", weight.device, weight.dtype, weight, rows_e)


def _points(job: ExpertsJob) -> Iterator[dict[str, Any]]:
    import torch

    for dtype in job.dtypes:
        torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        for point in job.points:
            rows_e = point.rows_e()
            print(f"{point.elements} elements, {point.rows} rows, {dtype}", flush=True)
            steps = {form: step(form, point, rows_e, torch_dtype, job.device) for form in FORMS}
            seconds = fastest_in_turns(steps, job.rounds, device_clock(job.device))
            yield {
                "device": job.device,
                "dtype": str(torch_dtype).removeprefix("torch."),
                "elements": point.elements,
                "num_experts": point.num_experts,
                "rows": point.rows,
                "padding": point.padding,
                "seconds": seconds,
            }


def step(form: str, point: Point, rows_e: list[int], dtype: Any, device: str) -> Callable[[], None]:
    """Forward and both gradients of one linear layer of all experts."""
    import torch

    from megatron_moe.experts.grouped_gemm import grouped_linear

    kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
    torch.manual_seed(1)
    x_RD = torch.randn(sum(rows_e), point.hidden, **kwargs).requires_grad_()
    shape = (point.num_experts, point.ffn, point.hidden)
    weight_eFD = torch.randn(shape, **kwargs).requires_grad_()
    grad_RF = torch.randn(sum(rows_e), point.ffn, **kwargs)

    def run() -> None:
        y_RF = grouped_linear(x_RD, weight_eFD, rows_e, form)
        torch.autograd.grad(y_RF, (x_RD, weight_eFD), grad_RF)

    return run


if __name__ == "__main__":
    main(Path(sys.argv[1]))
