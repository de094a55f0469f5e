"""Run one process of a training script with the plugin active.

Started by ``megatron-moe run``, or by hand under torchrun or Slurm::

    torchrun --nproc-per-node 8 -m megatron_moe.run [--device cpu] pretrain_gpt.py --num-experts 8 …
"""

import argparse
import ctypes
import logging
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_moe.activate import Device, activate
from megatron_moe.config import MoEConfigError
from megatron_moe.cpu_flags import flags_to_set
from megatron_moe.mcore.kernels import kernels_in_use
from megatron_moe.mcore.patching import PatchError
from megatron_moe.preflight import check_run

logger = logging.getLogger(__name__)
USER_FAULT = 2
DEVICE_VARIABLE = "MEGATRON_MOE_DEVICE"
DEVICES = ("auto", "cpu", "cuda")


def main(argv: Sequence[str] | None = None) -> None:
    """Activate the plugin in this process and run the script as ``__main__``.

    Raises:
        SystemExit: 2 for a user's fault, after one sentence from rank 0 on stderr.
    """
    options = _parser().parse_args(argv)
    first = os.environ.get("RANK", "0") == "0"
    try:
        world_size = _world_size()
        check_run(options.script, options.args)
        device = resolve_device(options.device)
        check_run(options.script, options.args, device, world_size)
    except ValueError as fault:
        raise _refused(fault, first) from None
    if first:
        _say(options.device, device, options.args)
    # As `python SCRIPT` does: the script's own checkout of Megatron goes before the installed one.
    sys.path[0] = str(options.script.resolve().parent)
    try:
        with _speaking(first), activate(device):
            if device == "cuda":  # on a CPU there is but one choice
                for line in kernels_in_use():
                    logger.info(line)
            sys.argv = [str(options.script), *options.args]
            runpy.run_path(str(options.script), run_name="__main__")
    except (MoEConfigError, PatchError) as fault:
        raise _refused(fault, first) from None


def resolve_device(asked: str) -> Device:
    """Return the device to use for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ValueError: ``cuda`` was asked for and there is none.
    """
    if asked == "cpu":
        return "cpu"
    found: Device = "cuda" if _driver_found() and _torch_finds_cuda() else "cpu"
    if asked == "cuda" and found == "cpu":
        raise ValueError(
            "--device cuda was asked for, but torch finds no CUDA device; use --device cpu"
        )
    return found


def _refused(fault: Exception, first: bool) -> SystemExit:
    if first:
        for line in str(fault).splitlines():
            print(f"megatron-moe: {line}", file=sys.stderr)
    return SystemExit(USER_FAULT)


def _driver_found() -> bool:
    """Whether a GPU is possible: torch's own answer costs seconds, and often this one does."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()  # AMD's driver
    return True


def _torch_finds_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _world_size() -> int:
    """Return the number of processes that the launcher announced.

    Raises:
        ValueError: Slurm started several processes, and none of them was told of the others.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"srun started {tasks} tasks without RANK and WORLD_SIZE, so that each would train "
            "alone; start one `megatron-moe run` a node, or export RANK, LOCAL_RANK, WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT from Slurm's variables"
        )
    return int(os.environ.get("WORLD_SIZE", "1"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron_moe.run", allow_abbrev=False)
    parser.add_argument(
        "--device", choices=DEVICES, default=os.environ.get(DEVICE_VARIABLE, "auto")
    )
    parser.add_argument("script", type=Path, metavar="SCRIPT")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS")
    return parser


def auto_reason(device: Device) -> str:
    """Say what ``auto`` became, and why."""
    found = "a" if device == "cuda" else "no"
    return f"--device {device}, since torch finds {found} CUDA device"


def _say(asked: str, device: Device, argv: Sequence[str]) -> None:
    if asked == "auto":
        print(f"megatron-moe: {auto_reason(device)}", file=sys.stderr)
    if device == "cpu":
        flags = " ".join(flag.typed for flag in flags_to_set(argv))
        print(f"megatron-moe: set for the CPU: {flags}", file=sys.stderr, flush=True)


@contextmanager
def _speaking(first: bool) -> Iterator[None]:
    """Show what the package logs, such as the form of the expert GEMM, whatever Megatron shows."""
    package = logging.getLogger("megatron_moe")
    handler = logging.StreamHandler() if first else logging.NullHandler()
    handler.setFormatter(logging.Formatter("megatron-moe: %(message)s"))
    kept = package.level, package.propagate
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.level, package.propagate = kept


if __name__ == "__main__":
    main()
