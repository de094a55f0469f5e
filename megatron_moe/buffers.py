"""Buffers that move with a module and are never rounded with it."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor


class ExactBuffers:
    """Beside a module: its buffers keep their dtype in ``.half()`` and ``.bfloat16()``.

    Counts, biases and scales decide; a rounded one decides otherwise. It goes before the module
    among the bases.
    """

    _buffers: dict[str, Tensor | None]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        exact = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[misc]  # the module's
        for name, moved in self._buffers.items():
            before = exact[name]
            if moved is not None and before is not None and not before.is_meta:
                self._buffers[name] = before.to(moved.device)
        return self
