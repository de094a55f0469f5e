"""Which optimizer a parameter belongs to, and which embeddings are shared between stages."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import replace

from megatron_moe.tools.checkpoint.model.arrays import Array
from megatron_moe.tools.checkpoint.model.buffers import Parameter, default_bucket_size
from megatron_moe.tools.checkpoint.model.catalogue import EMBEDDING, OUTPUT, Key
from megatron_moe.tools.checkpoint.model.layout import Layout

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


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


def runs_stacked(args: Namespace) -> bool:
    """Whether a run has this plugin's grouped experts: one parameter, saved as ``weight{i}``."""
    return bool(
        getattr(args, "moe_grouped_gemm", False)
        and getattr(args, "moe_layer_impl", "megatron") == "plugin"
        and getattr(args, "transformer_impl", "") != "transformer_engine"
    )


def stacked(arrays: Iterable[tuple[str, Key, Array]]) -> Iterator[tuple[str, Key, Array]]:
    """Put experts saved one by one (``weight0``, ``weight1``) into the parameter they share."""
    first: dict[str, tuple[str, Key, Array]] = {}
    count: dict[str, int] = {}
    order: list[tuple[str, tuple[str, Key, Array] | None]] = []
    for name, key, array in arrays:
        base = name.rstrip("0123456789")
        if key.expert is None or base == name:
            order.append((name, (name, key, array)))
            continue
        if base not in first:
            first[base] = (base, key, array)
            order.append((base, None))
        count[base] = count.get(base, 0) + 1
    for base, entry in order:
        if entry is not None:
            yield entry
            continue
        name, key, one = first[base]
        before, number, after = _EXPERT.split(one.template, maxsplit=1)
        template = f"{before}.experts.{{expert}}.{after}"
        shape = (count[base], *one.shape)
        array = replace(one, template=template, shape=shape, lead=("expert",), first=(int(number),))
        yield name, replace(key, expert=0, stacked=True), array


def of_member(chunks: list[list[Parameter]], layout: Layout, member: int) -> list[list[Parameter]]:
    """Return the parameters of one optimizer: 0 dense, 1 experts, where they have their own."""
    separate = layout.separate_experts
    return [[p for p in chunk if not separate or p.expert == bool(member)] for chunk in chunks]


def bucket_size(args: Namespace, layout: Layout, pp: int, chunk: int) -> int | None:
    """Return the bucket size of a chunk by Megatron's rule; None for one bucket."""
    if not getattr(args, "overlap_grad_reduce", False) or pp > 0 or chunk > 0:
        return None
    size = getattr(args, "ddp_bucket_size", None)
    return int(size) if size else default_bucket_size(layout.dp)
