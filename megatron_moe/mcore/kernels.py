"""Which fused kernels Megatron took for Adam and norms, and why not better ones."""

from __future__ import annotations

import importlib.util
from typing import Any

_NAMES = {"transformer_engine": "Transformer Engine's", "apex": "Apex's"}


def kernels_in_use() -> list[str]:
    """One line each for the optimizer and the norms of the local layer spec.

    Call it when Megatron has been imported: it decides then.
    """
    from megatron.core import optimizer
    from megatron.core.models import backends

    return [
        f"Adam: {_whose(optimizer.Adam, ('transformer_engine', 'apex'))}",
        f"norms of the local spec: {_whose(backends.LNImpl, ('apex',))}",
    ]


def _whose(kernel: Any, better: tuple[str, ...]) -> str:
    package = kernel.__module__.split(".")[0]
    if package in _NAMES or "fused" in kernel.__module__:
        return f"{_NAMES.get(package, _NAMES['apex'])}, fused"
    return f"torch's ({'; '.join(_why_not(name) for name in better)})"


def _why_not(package: str) -> str:
    found = importlib.util.find_spec(package) is not None
    return f"{_NAMES[package]} {'does not import' if found else 'is not installed'}"
