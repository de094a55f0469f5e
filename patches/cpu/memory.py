"""Memory reports speak of this process's share of the host's memory."""

import resource
import sys
from collections.abc import Callable
from typing import Any

import psutil

from megatron_moe.patches.cpu.device import cuda_stand_in

_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in a unit of ru_maxrss


def _resident(original: Callable[..., int], device: Any = None) -> int:
    return int(psutil.Process().memory_info().rss)


def _peak(original: Callable[..., int], device: Any = None) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT


def _used(original: Callable[..., int], device: Any = None) -> int:
    return int(psutil.virtual_memory().used)


def _stats(original: Callable[..., dict[str, Any]], device: Any = None) -> dict[str, Any]:
    resident, peak = int(psutil.Process().memory_info().rss), _peak(lambda: 0)
    return {
        "reserved_bytes.all.current": resident,
        "allocated_bytes.all.current": resident,
        "allocated_bytes.all.peak": peak,
        "allocation.all.current": 0,  # the host's allocator does not count its blocks
    }


_WHY = "Megatron reports it, and would report zero"
_HOLDERS = ("torch.cuda",)

PATCHES = (
    cuda_stand_in("torch.cuda.memory.memory_allocated", _WHY, wrapper=_resident, holders=_HOLDERS),
    cuda_stand_in("torch.cuda.memory.memory_reserved", _WHY, wrapper=_resident, holders=_HOLDERS),
    cuda_stand_in("torch.cuda.memory.max_memory_allocated", _WHY, wrapper=_peak, holders=_HOLDERS),
    cuda_stand_in("torch.cuda.memory.max_memory_reserved", _WHY, wrapper=_peak, holders=_HOLDERS),
    cuda_stand_in("torch.cuda.memory.memory_stats", _WHY, wrapper=_stats, holders=_HOLDERS),
    cuda_stand_in("torch.cuda.device_memory_used", _WHY, wrapper=_used),
)
