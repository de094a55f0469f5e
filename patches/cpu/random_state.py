"""The random state of the device is that of the CPU's default generator."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_moe.mcore.patching import Patch
from megatron_moe.patches.cpu.device import cuda_stand_in


def _manual_seed(original: Callable[[int], None], seed: int) -> None:
    # Not torch.manual_seed, which calls torch.cuda.manual_seed_all in turn.
    torch.default_generator.manual_seed(int(seed))


def _get_rng_state(original: Callable[..., Tensor], device: Any = "cuda") -> Tensor:
    return torch.default_generator.get_state()


def _set_state(state: Tensor) -> None:
    if state.numel() != torch.default_generator.get_state().numel():
        raise ValueError(
            "the checkpoint's random state was saved on a GPU and means nothing on a CPU; "
            "load it with --no-load-rng"
        )
    torch.default_generator.set_state(state)


def _set_rng_state(original: Callable[..., None], new_state: Tensor, device: Any = "cuda") -> None:
    _set_state(new_state)


def _set_cuda_rng_state(
    original: Callable[..., None], new_state: Tensor, device: int = -1, graph_safe: bool = False
) -> None:
    assert not graph_safe, "CUDA graphs are refused before a run on a CPU"
    _set_state(new_state)


PATCHES = (
    cuda_stand_in(
        "torch.cuda.random.manual_seed",
        "weights and dropout are drawn from it",
        wrapper=_manual_seed,
        holders=("torch.cuda",),
    ),
    cuda_stand_in(
        "torch.cuda.random.manual_seed_all",
        "torch.manual_seed calls it, else it would queue seeds for a device that never comes",
        wrapper=_manual_seed,
        holders=("torch.cuda",),
    ),
    cuda_stand_in(
        "torch.cuda.random.get_rng_state",
        "trackers, recompute and checkpoints save it",
        wrapper=_get_rng_state,
        holders=("torch.cuda",),
    ),
    cuda_stand_in(
        "torch.cuda.random.set_rng_state",
        "trackers, recompute and checkpoints restore it",
        wrapper=_set_rng_state,
        holders=("torch.cuda",),
    ),
    Patch(
        target="megatron.core.tensor_parallel.random._set_cuda_rng_state",
        wrapper=_set_cuda_rng_state,
        reason="it goes to CUDA's generators directly, past torch.cuda.set_rng_state",
        retire_when="Megatron restores random states through torch.accelerator",
        versions=">=0.19,<0.20",
        fingerprints=("b179c9d95438",),
    ),
)
