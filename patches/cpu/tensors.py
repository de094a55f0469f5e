"""Tensors asked for on a GPU are made on the CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_moe.patches.cpu.device import cuda_stand_in

_FACTORIES = (
    *("arange", "as_tensor", "eye", "full", "full_like", "linspace", "tensor"),
    *("empty", "empty_like", "ones", "ones_like", "zeros", "zeros_like"),
    *("rand", "rand_like", "randint", "randn", "randn_like", "randperm"),
)


def on_cpu(device: Any) -> Any:
    """Return the CPU for any way of naming a CUDA device, and other devices as they are."""
    if isinstance(device, str):
        return "cpu" if device.startswith("cuda") else device
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    return torch.device("cpu") if type(device) is int else device


def _factory(original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if kwargs.get("device") is not None:
        kwargs["device"] = on_cpu(kwargs["device"])
    kwargs.pop("pin_memory", None)
    return original(*args, **kwargs)


def _to(original: Callable[..., Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args:
        args = (on_cpu(args[0]), *args[1:])
    if "device" in kwargs:
        kwargs["device"] = on_cpu(kwargs["device"])
    return original(tensor, *args, **kwargs)


PATCHES = (
    *(
        cuda_stand_in(
            f"torch.{name}", 'Megatron names device="cuda" in some 60 places', wrapper=_factory
        )
        for name in _FACTORIES
    ),
    cuda_stand_in("torch.Tensor.to", "Megatron moves tensors to the GPU by name", wrapper=_to),
)
