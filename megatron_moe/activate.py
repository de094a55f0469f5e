"""Bring the plugin into force in this process, and take it out again."""

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Literal

Device = Literal["cpu", "cuda"]

CPU_ENVIRONMENT: Mapping[str, str] = {
    "CUDA_VISIBLE_DEVICES": "",
    "TORCH_COMPILE_DISABLE": "1",  # compiling the fusions costs minutes and gains nothing
}
CPU_DEFAULTS: Mapping[str, str] = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron insists on a value
    "OMP_NUM_THREADS": "1",
}
# They take over the router's matmul, the norms and the optimizer, with kernels for GPUs only.
HIDDEN_ON_CPU = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "flash_attn")
# Everything that binds a patched name by value must be there before holders are compared.
_MEGATRON = (
    "megatron.training",
    "megatron.training.argument_utils",
    "megatron.training.models.gpt",
    "megatron.core.models.gpt",
)
_TRACKER = "megatron.core.tensor_parallel.random"
# Right on a GPU; here the device's random state is the CPU's, and Megatron's tracker changes it.
_SAME_STATE = "CPU RNG state changed within GPU RNG context"


def activate(device: Device) -> ExitStack:
    """Import Megatron and apply the declared patches for ``device`` and the plugin's seam.

    Call it before a model is built. Under ``"cpu"`` Transformer Engine and Apex are hidden from
    import, so this must come before Megatron's first import where they are installed.

    Args:
        device: ``"cpu"`` for gloo on the CPU, ``"cuda"`` for a GPU.

    Returns:
        A stack to close (or use as a context manager); closing puts every original back.

    Raises:
        PatchError: A patch does not fit the installed Megatron or torch, or one is in force.
        RuntimeError: ``"cpu"`` was asked for too late in this process.
    """
    stack = ExitStack()
    with ExitStack() as on_error:
        on_error.callback(stack.close)
        if device == "cpu":
            stack.enter_context(_environment())
            stack.enter_context(_hidden(HIDDEN_ON_CPU))
            stack.enter_context(_without(_TRACKER, _SAME_STATE))
        import_megatron()
        _apply(stack, device)
        on_error.pop_all()
    return stack


def _apply(stack: ExitStack, device: Device) -> None:
    # Declarations import torch and are read against Megatron: not before it is there.
    from megatron_moe.mcore.patching import applied
    from megatron_moe.patches import cpu, megatron
    from megatron_moe.patches.megatron.compile_helpers import helpers_of_wheel

    stack.enter_context(helpers_of_wheel())
    patches = (*cpu.ALL, *megatron.ALL) if device == "cpu" else megatron.ALL
    stack.enter_context(applied(patches))


def import_megatron() -> None:
    """Import what the patches touch, without the warnings about what is not installed."""
    with _without("torch.utils.cpp_extension", "No CUDA runtime"), warnings.catch_warnings():
        # Some twenty lines say that Apex and Transformer Engine are missing; `doctor` says it once.
        warnings.simplefilter("ignore")
        for module in _MEGATRON:
            importlib.import_module(module)


@contextmanager
def _without(logger_name: str, message: str) -> Iterator[None]:
    def keep(record: logging.LogRecord) -> bool:
        return message not in record.getMessage()

    logger = logging.getLogger(logger_name)
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@contextmanager
def _environment() -> Iterator[None]:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RuntimeError("--device cpu was asked for after CUDA was used in this process")
    new = {**CPU_ENVIRONMENT}
    new |= {name: value for name, value in CPU_DEFAULTS.items() if name not in os.environ}
    old = {name: os.environ.get(name) for name in new}
    os.environ.update(new)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _hidden(packages: tuple[str, ...]) -> Iterator[None]:
    """Make ``packages`` look as if they were not installed."""
    if early := [name for name in packages if sys.modules.get(name) is not None]:
        raise RuntimeError(
            f"{', '.join(early)} imported before --device cpu was asked for; activate first"
        )
    for name in packages:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in packages:
            sys.modules.pop(name, None)
