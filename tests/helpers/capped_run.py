"""Train under a cap on memory: ``python -m helpers.capped_run FOLDER``, one line of JSON a run.

Megatron is imported once, then each run is a fork. The cap is ``RLIMIT_DATA``: what the process may
have of heap and private writable memory. Shared mappings of files do not count, for they are the
page cache's to write and drop; a container's limit, or too little RAM, presses in the same way.
"""

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from helpers.runs import Job, Means

from megatron_moe.config import MoEConfig

ALLOWANCE = 72 << 20  # bytes on top of what the imports took
MODEL = {
    "num_layers": 16,
    "hidden_size": 128,
    "num_moe_experts": 16,
    "moe_ffn_hidden_size": 256,
    "moe_grouped_gemm": True,
}
# Per expert of a layer: gated FC1 and FC2, in fp32.
WEIGHTS = 4 * 16 * 16 * 3 * 128 * 256
PLAIN = MoEConfig(expert_gemm="loop")


def offloaded(folder: str, **changes: Any) -> MoEConfig:
    """Weights, gradients and optimizer state in files, one expert on the device."""
    fields = {"expert_offload": "file", "offload_dir": folder, "offload_cache": 1}
    return MoEConfig(expert_gemm="loop", **(fields | {"offload_optimizer": True} | changes))


def main() -> None:
    """Runs: how, under a cap or not, killed in the first step or not."""
    from megatron_moe.activate import activate

    folder = sys.argv[1]
    logging.getLogger("megatron").setLevel(logging.WARNING)  # else it lists every parameter
    with activate("cpu"):
        import helpers.training_run  # noqa: F401

        weights_only = offloaded(folder, offload_optimizer=False)
        for name, moe, capped, killed in (
            ("offloaded, capped", offloaded(folder), True, False),
            ("plain, capped", PLAIN, True, False),
            ("only weights offloaded, capped", weights_only, True, False),
            ("plain", PLAIN, False, False),
            ("offloaded, killed", offloaded(folder), False, True),
        ):
            sys.stdout.flush()
            child = os.fork()
            if not child:
                _run(name, moe, capped, killed)
            _, status = os.waitpid(child, 0)
            if killed:
                assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
                print(json.dumps({"run": name}), flush=True)
            else:
                assert status == 0, f"{name}: wait status {status}"


def _run(name: str, moe: MoEConfig, capped: bool, killed: bool) -> None:
    """Train in this process, say what came of it, and end the process."""
    code = 1
    try:
        print(json.dumps({"run": name} | _trained(moe, capped, killed)), flush=True)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _trained(moe: MoEConfig, capped: bool, killed: bool) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from helpers import training_run

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    if capped:  # when the process groups are there: each of gloo's has threads, with their stacks
        training_run.enter_layout = partial(_enter_and_cap, training_run.enter_layout)
    done: dict[str, Any] = {"losses": [], "norms": []}
    try:
        training = training_run.Training(Job(model=MODEL, moe=moe, num_sequences=2), Means())
        done["weights"] = sum(
            p.nbytes for n, p in training.chunks[0].named_parameters() if ".experts." in n
        )
        for _ in range(2):
            ((total, count), *_rest) = training.forward_backward()
            done["losses"].append(total / count)
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
            done["norms"].append(training.update())
    except (RuntimeError, MemoryError) as error:
        if "allocate memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        done["out_of_memory"] = str(error) or "MemoryError"
    return done | {"data": _data_bytes()}


def _enter_and_cap(enter_layout: Callable[[Any], Any], layout: Any) -> Any:
    places = enter_layout(layout)
    limit = _data_bytes() + ALLOWANCE
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return places


def _data_bytes() -> int:
    """What RLIMIT_DATA counts, of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmData in /proc/self/status")


if __name__ == "__main__":
    main()
