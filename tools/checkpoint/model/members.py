"""Which optimizer a parameter belongs to, and which embeddings are shared between stages."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable

from megatron_moe.tools.checkpoint.model.arrays import Array
from megatron_moe.tools.checkpoint.model.buffers import Parameter, default_bucket_size
from megatron_moe.tools.checkpoint.model.catalogue import EMBEDDING, OUTPUT, Key
from megatron_moe.tools.checkpoint.model.layout import Layout


def parameters_of(
    arrays: Iterable[tuple[str, Key, Array]],
    layout: Layout,
    *,
    tied: bool,
    first_stage: bool,
    has_mtp: bool,
    mtp_here: bool,
) -> list[Parameter]:
    """Return one model chunk's parameters in registration order.

    Args:
        arrays: Key in the module, what it is, and what it is made of; no buffers.
        layout: Parallel sizes.
        tied: Whether embedding and output share one weight.
        first_stage: Whether this is the first chunk of the model.
        has_mtp: Whether the model predicts several tokens, which needs the embedding again.
        mtp_here: Whether this chunk holds MTP layers.
    """
    out = []
    for name, key, array in arrays:
        shared = False
        if layout.pp > 1 and (tied or has_mtp):
            if name == EMBEDDING:
                shared = first_stage or mtp_here
            elif name == OUTPUT:
                shared = tied and not mtp_here
        expert = key.expert is not None and layout.separate_experts
        decay = not (len(array.shape) == 1 or name.endswith(".bias") or _is_bias(name))
        out.append(Parameter(name, array, expert, decay, shared))
    return out


def _is_bias(name: str) -> bool:
    """A grouped expert's ``bias3``."""
    return name.rstrip("0123456789").endswith(".bias")


def bucket_size(args: Namespace, layout: Layout, pp: int, chunk: int) -> int | None:
    """Return the bucket size of a chunk by Megatron's rule; None for one bucket."""
    if not getattr(args, "overlap_grad_reduce", False) or pp > 0 or chunk > 0:
        return None
    size = getattr(args, "ddp_bucket_size", None)
    return int(size) if size else default_bucket_size(layout.dp)
