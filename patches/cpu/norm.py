"""Layer norms of torch that may stand under sequence parallelism."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_moe.mcore.patching import Patch


class ZeroCentredLayerNorm(torch.nn.LayerNorm):
    """Layer norm whose weight is gamma - 1, so that weight decay pulls gamma to one."""

    def reset_parameters(self) -> None:
        """Start from gamma = 1."""
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised ``input``, any shape ending in ``(D,)``."""
        return torch.nn.functional.layer_norm(
            input, self.normalized_shape, self.weight + 1, self.bias, self.eps
        )


class ZeroCentredRMSNorm(torch.nn.RMSNorm):
    """RMS norm whose weight is gamma - 1, so that weight decay pulls gamma to one."""

    def reset_parameters(self) -> None:
        """Start from gamma = 1."""
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised ``x``, any shape ending in ``(D,)``."""
        return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight + 1, self.eps)


_NORMS: dict[tuple[str, bool], type[torch.nn.Module]] = {
    ("LayerNorm", False): torch.nn.LayerNorm,
    ("LayerNorm", True): ZeroCentredLayerNorm,
    ("RMSNorm", False): torch.nn.RMSNorm,
    ("RMSNorm", True): ZeroCentredRMSNorm,
}


def _torch_norm(
    original: Callable[..., Any],
    cls: type,
    config: Any,
    hidden_size: int,
    eps: float = 1e-5,
    **kwargs: Any,
) -> torch.nn.Module:
    zero_centred = config.layernorm_zero_centered_gamma
    plain = not config.sequence_parallel and not zero_centred
    if plain or config.memory_efficient_layer_norm or config.persist_layer_norm:
        return original(cls, config, hidden_size, eps, **kwargs)
    norm_class = _NORMS.get((config.normalization, zero_centred))
    if norm_class is None:
        raise ValueError(
            f"--normalization {config.normalization} has no form for sequence parallelism or "
            "zero-centred gamma on a CPU; use LayerNorm or RMSNorm"
        )
    norm = norm_class(hidden_size, eps=eps)
    for parameter in norm.parameters():
        # Megatron sums the gradients of such parameters over the tensor-parallel group.
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


PATCHES = (
    Patch(
        target="megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__",
        wrapper=_torch_norm,
        reason="the norms without Apex or TE refuse sequence parallelism, which MoE with TP needs",
        retire_when="WrappedTorchNorm marks its parameters as sequence_parallel",
        versions=">=0.19,<0.20",
        fingerprints=("b54d62a62531",),
    ),
)
