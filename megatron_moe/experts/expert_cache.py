"""The few experts that are on the device: a least-recently-used cache, filled ahead of use.

Who computes announces what comes, in order (:meth:`ExpertCache.plan`), and then asks for one
matrix after the other. A single background thread copies what comes next. All bookkeeping is done
by the asking thread, when it asks: which copies are made, and the counts, follow from the order of
the questions alone and not from the clock. What was announced is never evicted for what was not.

Source: the expert caches of MoE-Infinity (arXiv 2401.14361); here the plan is mostly known.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

_LINE = 64  # bytes; a matrix product may differ in its last bits with the alignment of operands

Key = Hashable
Source = Callable[[], Tensor]


@dataclass(slots=True)
class Counts:
    """What the cache did: times a matrix was there or not when asked for, and bytes copied."""

    hits: int = 0
    misses: int = 0
    prefetched_bytes: int = 0
    copied_bytes: int = 0
    evicted: int = 0


@dataclass(slots=True)
class _Entry:
    nbytes: int
    copy: Future[Tensor] | Tensor

    def tensor(self) -> Tensor:
        """The matrix, waiting for its copy; an error of the copy is raised here."""
        if isinstance(self.copy, Future):
            self.copy = self.copy.result()
        return self.copy


class ExpertCache:
    """Matrices by key, in at most ``capacity`` bytes; one thread asks at a time.

    Args:
        capacity: Bytes; a single matrix that is larger is kept alone.
        device: Where the copies lie.
        prefetch: Whether what was announced is copied ahead of use.
    """

    def __init__(
        self, capacity: int = 0, device: str | torch.device = "cpu", *, prefetch: bool = True
    ) -> None:
        self.capacity, self.device, self.prefetch = capacity, torch.device(device), prefetch
        self.counts = Counts()
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._coming: deque[tuple[Key, Source]] = deque()
        self._now: Key = None
        self._thread: ThreadPoolExecutor | None = None

    def plan(self, keys: Iterable[tuple[Key, Source]]) -> None:
        """Announce what will be asked for, soonest first; what was announced before is forgotten.

        Args:
            keys: Keys, and what gives the matrix to copy.
        """
        self._coming = deque(keys)
        self._now = None

    def fetch(self, key: Key, source: Source) -> Tensor:
        """The matrix of ``key`` on the device, valid until the next question.

        Args:
            key: What is wanted.
            source: Gives the matrix to copy, when it is not there.

        Cost: one copy on a miss, none on a hit.
        """
        self._now = key
        while self._coming and self._coming[0][0] == key:
            self._coming.popleft()
        entry = self._entries.get(key)
        if entry is None:
            self.counts.misses += 1
            matrix = source()
            if not self._make_room(matrix.nbytes, {coming for coming, _ in self._coming}):
                self._make_room(matrix.nbytes, set())
            entry = self._insert(key, matrix.nbytes, _copied(matrix, self.device))
            self.counts.copied_bytes += matrix.nbytes
        else:
            self.counts.hits += 1
        self._entries.move_to_end(key)
        self._copy_ahead()
        return entry.tensor()

    def invalidate(self) -> None:
        """Forget everything; returns when nothing is being copied any more."""
        self._coming.clear()
        self._now = None
        try:
            for entry in self._entries.values():
                entry.tensor()
        finally:
            self._entries.clear()
            self._bytes = 0

    def close(self) -> None:
        """Forget everything and end the thread; a later question starts another."""
        self.invalidate()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def summary(self) -> dict[str, int]:
        """Counts since the start, and the bytes held now."""
        return asdict(self.counts) | {"held_bytes": self._bytes, "capacity_bytes": self.capacity}

    def _copy_ahead(self) -> None:
        if not self.prefetch:
            return
        keep = {self._now}
        for key, source in self._coming:
            keep.add(key)
            if key in self._entries:
                continue
            matrix = source()
            if not self._make_room(matrix.nbytes, keep):
                return
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="moe-prefetch")
            copy = self._thread.submit(_copied, matrix, self.device)
            self._insert(key, matrix.nbytes, copy)
            self.counts.prefetched_bytes += matrix.nbytes

    def _insert(self, key: Key, nbytes: int, copy: Future[Tensor] | Tensor) -> _Entry:
        entry = self._entries[key] = _Entry(nbytes, copy)
        self._bytes += nbytes
        return entry

    def _make_room(self, nbytes: int, keep: set[Key]) -> bool:
        """Evict what is not in ``keep``, least recently used first; False if that is too little."""
        free = self.capacity - self._bytes
        victims: list[Key] = []
        for key, entry in self._entries.items():
            if free >= nbytes:
                break
            if key not in keep:
                victims.append(key)
                free += entry.nbytes
        if free < nbytes and keep:
            return False
        for key in victims:
            entry = self._entries.pop(key)
            entry.tensor()  # a copy under way still needs its bytes
            self._bytes -= entry.nbytes
            self.counts.evicted += 1
        return True


@torch.no_grad()
def _copied(matrix: Tensor, device: torch.device) -> Tensor:
    return empty_aligned(matrix.shape, matrix.dtype, matrix.data_ptr() % _LINE, device).copy_(
        matrix
    )


def empty_aligned(
    shape: torch.Size, dtype: torch.dtype, offset: int, device: torch.device
) -> Tensor:
    """An empty contiguous tensor that starts ``offset`` bytes after a cache line's start.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        offset: Bytes, a multiple of the dtype's size; taken modulo a cache line.
        device: Where it lies.
    """
    step = dtype.itemsize
    flat = torch.empty(shape.numel() + _LINE // step, dtype=dtype, device=device)
    start = (offset - flat.data_ptr()) % _LINE // step
    return flat[start : start + shape.numel()].view(shape)
