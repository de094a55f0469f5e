"""Bytes of the storages that are alive, by the phase in which each was made; exact anywhere."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REST = "rest"


class LiveBytes(TorchDispatchMode):
    """While active, counts every storage that an operator makes, until it is freed.

    Seen are all operators below autograd, in forward and backward. Not counted are storages that
    were there before, and what a kernel allocates and frees within itself. What an allocator adds
    (rounding, fragments, blocks kept for later) is not in it either.

    Attributes:
        live: Bytes alive now.
        peak: Most bytes alive at any time since :meth:`reset_peak`.
        by_phase: Bytes alive now by the phase in which they were made.
        rises: By phase, how far it rose above what was alive when it began, at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.by_phase: Counter[str] = Counter()
        self.rises: Counter[str] = Counter()
        self._phase = REST
        self._alive: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and True would import the compiler: 7 s

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        before = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **kwargs)
        for storage in _storages(out):
            # An input's storage comes back from views and from operators in place.
            if storage._cdata not in before and storage._cdata not in self._alive:
                self._born(storage)
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size, phase = storage._cdata, storage.nbytes(), self._phase
        self._alive.add(key)
        self.live += size
        self.by_phase[phase] += size
        self.peak = max(self.peak, self.live)
        # The Python object lives as long as the storage itself, whoever holds that.
        weakref.finalize(storage, self._freed, key, size, phase)

    def _freed(self, key: int, size: int, phase: str) -> None:
        self._alive.remove(key)
        self.live -= size
        self.by_phase[phase] -= size

    def reset_peak(self) -> None:
        """Count the peak from now on."""
        self.peak = self.live

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is made inside belongs to ``name``; the innermost phase counts."""
        outside, peak, began = self._phase, self.peak, self.live
        self._phase = name
        self.reset_peak()
        try:
            yield
        finally:
            self.rises[name] = max(self.rises[name], self.peak - began)
            self.peak = max(self.peak, peak)
            self._phase = outside

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call as a phase; in backward, where it is made again, as part of backward."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._phase != REST:
                return call(*args, **kwargs)
            with self.phase(name):
                return call(*args, **kwargs)

        return run


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            yield leaf.untyped_storage()
