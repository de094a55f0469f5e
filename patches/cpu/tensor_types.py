"""Optimizer code that names tensor types of CUDA.

The optimizers sort parameters by ``tensor.type()``, a string that is ``torch.cuda.FloatTensor`` on
a GPU only. During these calls, and only then, CPU tensors answer with the GPU's name.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_moe.mcore.patching import Patch

_plain_type = torch.Tensor.type


def _type(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs:
        return _plain_type(tensor, *args, **kwargs)
    return _plain_type(tensor).replace("torch.", "torch.cuda.", 1)


@contextlib.contextmanager
def _types_of_cuda() -> Iterator[None]:
    torch.Tensor.type = _type  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del torch.Tensor.type


def _with_types_of_cuda(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _types_of_cuda():
        return original(*args, **kwargs)


def _patch(target: str, fingerprint: str, *holders: str) -> Patch:
    return Patch(
        target=f"megatron.core.optimizer.{target}",
        wrapper=_with_types_of_cuda,
        reason="it compares tensor.type() with names of CUDA types",
        retire_when="Megatron compares dtypes instead of type names",
        versions=">=0.19,<0.20",
        fingerprints=(fingerprint,),
        holders=tuple(f"megatron.core.optimizer.{holder}" for holder in holders),
    )


PATCHES = (
    _patch("clip_grads.clip_grad_by_total_norm_fp32", "cf07b488fb76", "optimizer"),
    _patch("optimizer.Float16OptimizerWithFloat16Params.__init__", "56cba022b5e3"),
    _patch("distrib_optimizer.DistributedOptimizer.__init__", "81e958766954"),
)
