"""One device, the CPU: what Megatron asks ``torch.cuda`` about the device it runs on.

``torch.cuda.is_available()`` keeps telling the truth. Only calls that would raise, or that Megatron
takes as "no device, so set nothing up", are answered for the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_moe.mcore.patching import Patch

TORCH_VERSIONS = ">=2.10"
_RETIRE = "Megatron asks torch.accelerator, or its own device object, instead of torch.cuda"


def cuda_stand_in(
    target: str,
    reason: str,
    *,
    wrapper: Callable[..., Any] | None = None,
    value: Any = None,
    holders: tuple[str, ...] = (),
) -> Patch:
    """Declare a CPU answer for one name of torch."""
    replacement = {"wrapper": wrapper} if wrapper else {"value": value}
    return Patch(
        target=target,
        reason=reason,
        retire_when=_RETIRE,
        versions=TORCH_VERSIONS,
        distribution="torch",
        holders=holders,
        **replacement,
    )


def ignore(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Do nothing: work on a CPU is finished when the call returns."""


def _current_device(original: Callable[[], int]) -> torch.device:
    # A device, not an index: Megatron hands the answer on as ``device=...`` in some 200 places.
    return torch.device("cpu")


def _device_count(original: Callable[[], int]) -> int:
    # Zero would make Megatron skip the set-up of its groups and random states.
    return 1


@dataclass(frozen=True)
class CpuProperties:
    """The CPU, described as a GPU of compute capability 8.0.

    Megatron asks for 8 before it allows ``--moe-grouped-gemm``, which torch's grouped GEMM serves
    here; what an 8.0 has not (FP8) is refused, and what it has beyond this is refused by flag.
    """

    name: str = "CPU"
    major: int = 8
    minor: int = 0
    total_memory: int = field(default_factory=lambda: psutil.virtual_memory().total)
    multi_processor_count: int = field(default_factory=lambda: psutil.cpu_count() or 1)


def _properties(original: Callable[..., Any], device: Any = None) -> CpuProperties:
    return CpuProperties()


def _capability(original: Callable[..., Any], device: Any = None) -> tuple[int, int]:
    return (CpuProperties.major, CpuProperties.minor)


def _name(original: Callable[..., str], device: Any = None) -> str:
    return CpuProperties.name


def _initialize_megatron(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # An argument of Megatron's own that no caller passes on.
    kwargs["allow_no_cuda"] = True
    return original(*args[1:], **kwargs)


def _itself(original: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor


PATCHES = (
    cuda_stand_in(
        "torch.cuda.current_device",
        "Megatron allocates every parameter, buffer and message on it",
        wrapper=_current_device,
    ),
    cuda_stand_in(
        "torch.cuda.device_count",
        "Megatron sets up no groups and no random states when it is zero",
        wrapper=_device_count,
    ),
    cuda_stand_in(
        "torch.cuda.get_device_properties",
        "Megatron chooses features by the architecture",
        wrapper=_properties,
    ),
    cuda_stand_in(
        "torch.cuda.get_device_capability",
        "Megatron chooses features by the architecture",
        wrapper=_capability,
    ),
    cuda_stand_in("torch.cuda.get_device_name", "it appears in reports", wrapper=_name),
    cuda_stand_in("torch.cuda.set_device", "there is no device to choose", wrapper=ignore),
    cuda_stand_in("torch.cuda.synchronize", "there is nothing to wait for", wrapper=ignore),
    cuda_stand_in("torch.Tensor.cuda", "the tensor is on its device", wrapper=_itself),
    cuda_stand_in("torch.nn.Module.cuda", "the module is on its device", wrapper=_itself),
    cuda_stand_in("torch.Tensor.pin_memory", "no copy to a device to speed up", wrapper=_itself),
    cuda_stand_in("torch.Tensor.record_stream", "no caching allocator to tell", wrapper=ignore),
    Patch(
        target="megatron.training.initialize.initialize_megatron",
        wrapper=_initialize_megatron,
        reason="pretrain() cannot pass allow_no_cuda on, and without it CUDA is asserted",
        retire_when="pretrain() accepts allow_no_cuda",
        versions=">=0.19,<0.20",
        fingerprints=("d9b467adcaed",),
        holders=("megatron.training", "megatron.training.training"),
    ),
)
