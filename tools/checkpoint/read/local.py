"""What a rank's own tensor of a legacy file is made of."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.model.arrays import Array
from megatron_moe.tools.checkpoint.model.boxes import Shape
from megatron_moe.tools.checkpoint.model.catalogue import Key, atom_template
from megatron_moe.tools.checkpoint.model.layout import Coordinates, Layout


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model chunk stands: what turns its local numbers into the model's.

    Args:
        path: Of its file, for errors.
        at: Model-parallel coordinates.
        layers: Number of its first decoder layer.
        mtp: Number of its first MTP layer.
        layout: Parallel sizes.
        args: The run's arguments.
    """

    path: str
    at: Coordinates
    layers: int
    mtp: int
    layout: Layout
    args: Namespace


def local_array(name: str, key: Key, shape: Shape, place: Place) -> tuple[Array, Shape | None]:
    """Describe a rank's tensor; also return its strides where it is viewed in another shape.

    Raises:
        CheckpointError: How it is cut is not known, or it holds experts that cannot be.
    """
    first_layer = place.mtp if key.mtp else place.layers
    template = atom_template(key, None if key.layer is None else key.layer + first_layer)
    index, count = place.at.tp, place.layout.tp
    if key.expert is not None:
        index, count = place.at.etp, place.layout.expert_tp
    if key.rule.cut == "unknown" and count > 1:
        raise CheckpointError(
            f"{place.path}: {name}: whether it is cut over tensor-parallel ranks depends on the "
            "build: reshard this model from torch_dist"
        )
    cut = key.rule.cut_dim if count > 1 else None
    halves = 2 if key.rule.gated and is_gated(place.args) else 1
    one = Array(template, shape, halves=halves, cut=cut, index=index, count=count)
    return (one, None) if key.expert is None else _expert_array(name, key, one, place)


def _expert_array(name: str, key: Key, one: Array, place: Place) -> tuple[Array, Shape | None]:
    """Give a tensor of experts their numbers."""
    experts = getattr(place.args, "num_experts", None)
    if not experts or experts % place.layout.ep:
        raise CheckpointError(
            f"{place.path}: holds {name}, its arguments say {experts} experts with EP "
            f"{place.layout.ep}: files of different runs were mixed"
        )
    local = experts // place.layout.ep
    first = place.at.ep * local
    assert key.expert is not None
    if not key.stacked:
        template = one.template.replace("{expert}", str(first + key.expert))
        return replace(one, template=template), None
    stack = replace(one, lead=("expert",), first=(first,), transposed=key.transposed)
    if not key.transposed:
        return stack, None
    # GroupedMLP: memory is (e, in, out) whatever the parameter's shape says.
    hidden = int(place.args.hidden_size)
    inner = one.shape[0] * one.shape[1] // (local * hidden)
    shape = (local, hidden, inner) if name.endswith("weight1") else (local, inner, hidden)
    return replace(stack, shape=shape), (shape[1] * shape[2], shape[2], 1)


def is_gated(args: Namespace) -> bool:
    """Whether the feed-forward layers are gated (SwiGLU and its kin)."""
    return bool(
        getattr(args, "swiglu", False)
        or getattr(args, "gated_linear_unit", False)
        or getattr(args, "quick_geglu", False)
    )
