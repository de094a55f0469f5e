"""What Megatron makes for offloaded experts lies in files too, as their weights do.

Only addresses change; all arithmetic stays Megatron's and torch's. Without offloaded experts each
of these calls the original and does nothing else.
"""

from collections.abc import Callable
from typing import Any

import torch

from megatron_moe.experts import offload
from megatron_moe.experts.placement import Placing, PlacingBuffers, is_placed, store_of
from megatron_moe.mcore.patching import Patch

_VERSIONS = ">=0.19,<0.20"


def _make_buffer(
    original: Callable[..., None],
    self: Any,
    ddp_config: Any,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    params_with_names: list[tuple[torch.nn.Parameter, str]],
    *args: Any,
    **kwargs: Any,
) -> None:
    arguments = (self, ddp_config, param_dtype, grad_dtype, params_with_names, *args)
    store = next(filter(None, (store_of(param) for param, _ in params_with_names)), None)
    if store is None:
        return original(*arguments, **kwargs)
    for option in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(ddp_config, option):
            flag = "--" + option.replace("_", "-")
            raise ValueError(
                f"{option} with expert_offload = 'file': it reads and writes weights and "
                f"gradients while they are computed with; drop {flag} or --moe-expert-offload"
            )
    holds_parameters = ddp_config.use_distributed_optimizer
    with PlacingBuffers(self, store, holds_parameters=holds_parameters):
        return original(*arguments, **kwargs)


def _make_optimizer(
    original: Callable[..., Any], config: Any, model_chunks: list[Any], *args: Any, **kwargs: Any
) -> Any:
    modules = [module for chunk in model_chunks for module in chunk.modules()]
    offloads = (getattr(module, "offload", None) for module in modules)
    if not any(isinstance(found, offload.ExpertOffload) for found in offloads):
        return original(config, model_chunks, *args, **kwargs)
    if getattr(config, "optimizer_cpu_offload", False):
        raise ValueError(
            "optimizer_cpu_offload with expert_offload = 'file': both move the experts' optimizer "
            "state; drop --optimizer-cpu-offload, or take --moe-offload-optimizer for it"
        )
    if getattr(model_chunks[0].ddp_config, "use_megatron_fsdp", False):
        raise ValueError(
            "use_megatron_fsdp with expert_offload = 'file': FSDP keeps its own copies of the "
            "weights; drop --use-megatron-fsdp or --moe-expert-offload"
        )
    with Placing():
        optimizer = original(config, model_chunks, *args, **kwargs)
    # It makes the moments when a checkpoint is about to be loaded.
    init_state = getattr(optimizer, "init_state_fn", None)
    if init_state is not None:
        optimizer.init_state_fn = _placed(init_state)
    return optimizer


def _placed(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with Placing():
            return function(*args, **kwargs)

    return call


def _prepare(original: Callable[[Any], bool], self: Any) -> bool:
    if not _has_placed(self):
        return original(self)
    with Placing():
        return original(self)


def _step(original: Callable[[Any], bool], self: Any) -> bool:
    offload.end_batch()
    if not _has_placed(self):
        return original(self)
    _move_state(self)
    with Placing():
        return original(self)


def _has_placed(optimizer: Any) -> bool:
    if getattr(optimizer, "is_stub_optimizer", False):
        return False
    return any(is_placed(parameter) for parameter in optimizer.get_parameters())


def _move_state(optimizer: Any) -> None:
    """Move what a checkpoint brought into memory; one tensor at a time, and mostly none."""
    state = optimizer.optimizer.state
    for parameter in optimizer.get_parameters():
        if not is_placed(parameter):
            continue
        for name, value in state.get(parameter, {}).items():
            whole = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if whole and not is_placed(value):
                with Placing():
                    state[parameter][name] = torch.zeros_like(parameter, dtype=value.dtype)
                state[parameter][name].copy_(value)


PATCHES = (
    Patch(
        target="megatron.core.distributed.param_and_grad_buffer._ParamAndGradBuffer.__init__",
        wrapper=_make_buffer,
        reason="it allocates the memory of gradients (and of weights, for the distributed "
        "optimizer) itself; offloaded experts have theirs in a file",
        retire_when="DDP takes an allocator",
        versions=_VERSIONS,
        fingerprints=("396a1dff0f7f",),
    ),
    Patch(
        target="megatron.core.optimizer._get_megatron_optimizer_based_on_param_groups",
        wrapper=_make_optimizer,
        reason="every optimizer copies its parameters to fp32 where it likes; those of offloaded "
        "experts go into files",
        retire_when="optimizers take an allocator",
        versions=_VERSIONS,
        fingerprints=("6a29af7290de",),
    ),
    Patch(
        target="megatron.core.optimizer.optimizer.MixedPrecisionOptimizer.prepare_grads",
        wrapper=_prepare,
        reason="gradients in 16 bits are copied to fp32; those of offloaded experts into files",
        retire_when="optimizers take an allocator",
        versions=_VERSIONS,
        fingerprints=("c4cbff465617",),
    ),
    Patch(
        target="megatron.core.optimizer.optimizer.MixedPrecisionOptimizer.step_with_ready_grads",
        wrapper=_step,
        reason="the first step makes the moments, those of offloaded experts in files; and what "
        "is cached of them is no longer right",
        retire_when="optimizers take an allocator and call back after a step",
        versions=_VERSIONS,
        fingerprints=("ecd7b034b8df",),
    ),
    Patch(
        target="megatron.core.optimizer.optimizer.FP32Optimizer.step_with_ready_grads",
        wrapper=_step,
        reason="the first step makes the moments, those of offloaded experts in files; and what "
        "is cached of them is no longer right",
        retire_when="optimizers take an allocator and call back after a step",
        versions=_VERSIONS,
        fingerprints=("bbb3bfede92d",),
    ),
)
