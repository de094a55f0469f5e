"""Collectives of gloo, called the way Megatron calls NCCL's."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_moe.patches.cpu.device import cuda_stand_in


def _on_host(splits: Any) -> list[int] | None:
    return splits.tolist() if isinstance(splits, Tensor) else splits


def _all_to_all_single(
    original: Callable[..., Any],
    output: Tensor,
    input: Tensor,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    # Megatron brings splits to the host as tensors, which are left as they are on a CPU.
    return original(
        output, input, _on_host(output_split_sizes), _on_host(input_split_sizes), *args, **kwargs
    )


PATCHES = (
    cuda_stand_in(
        "torch.distributed.all_to_all_single",
        "Megatron's dispatcher hands over splits as tensors when they are on the host already",
        wrapper=_all_to_all_single,
    ),
)
