"""Streams and events on a CPU: everything is in order already, so they wait for nothing."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron_moe.patches.cpu.device import cuda_stand_in, ignore


class CpuStream:
    """Answers like a CUDA stream on which all work is finished."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Return the only priority there is, twice."""
        return (0, 0)

    def wait_stream(self, stream: "CpuStream") -> None:
        """Return at once: the other stream has finished."""

    def wait_event(self, event: "CpuEvent") -> None:
        """Return at once: the event has happened."""

    def record_event(self, event: "CpuEvent | None" = None) -> "CpuEvent":
        """Record ``event``, or a new one, now."""
        event = event or CpuEvent()
        event.record(self)
        return event

    def query(self) -> bool:
        """Say that all work is finished."""
        return True

    def synchronize(self) -> None:
        """Return at once."""


class CpuEvent:
    """Answers like a CUDA event: a point in time on the host's clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: CpuStream | None = None) -> None:
        """Remember the time."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: "CpuEvent") -> float:
        """Return the milliseconds from this event to ``end``."""
        return (end._seconds - self._seconds) * 1e3

    def wait(self, stream: CpuStream | None = None) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Say that it has happened."""
        return True

    def synchronize(self) -> None:
        """Return at once."""


_THE_STREAM = CpuStream()


def _current_stream(original: Callable[..., Any], device: Any = None) -> CpuStream:
    return _THE_STREAM


def _stream(original: Callable[..., Any], stream: Any) -> AbstractContextManager[None]:
    return nullcontext()


def _range(original: Callable[..., Any], *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
    return nullcontext()


def _no(original: Callable[[], bool]) -> bool:
    return False


PATCHES = (
    cuda_stand_in("torch.cuda.Stream", "dispatchers, DDP and offloading make one", value=CpuStream),
    cuda_stand_in("torch.cuda.Event", "timers and overlap record one", value=CpuEvent),
    cuda_stand_in("torch.cuda.current_stream", "side streams wait for it", wrapper=_current_stream),
    cuda_stand_in("torch.cuda.stream", "side work runs under it", wrapper=_stream),
    cuda_stand_in("torch.cuda.set_stream", "there is one stream", wrapper=ignore),
    cuda_stand_in(
        "torch.cuda.is_current_stream_capturing", "nothing is captured on a CPU", wrapper=_no
    ),
    cuda_stand_in("torch.cuda.nvtx.range_push", "no profiler listens", wrapper=ignore),
    cuda_stand_in("torch.cuda.nvtx.range_pop", "no profiler listens", wrapper=ignore),
    cuda_stand_in("torch.cuda.nvtx.range", "no profiler listens", wrapper=_range),
)
