"""A hybrid model's last norm, where Transformer Engine is not in use."""

from collections.abc import Callable
from typing import Any

from megatron_moe.mcore.patching import Patch


def _te_norm(
    original: Callable[..., Any],
    cls: type,
    config: Any,
    hidden_size: int,
    eps: float = 1e-5,
    **rest: Any,
) -> Any:
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    if HAVE_TE:
        return original(cls, config, hidden_size, eps, **rest)
    return WrappedTorchNorm(config, hidden_size, eps)


PATCHES = (
    Patch(
        target="megatron.core.extensions.transformer_engine.TENorm.__new__",
        wrapper=_te_norm,
        reason="HybridStack builds its last norm from it by name, whatever the stack's spec says",
        retire_when="the final norm of HybridStack is part of its spec",
        versions=">=0.19,<0.20",
        fingerprints=("3ca427d35215",),
    ),
)
