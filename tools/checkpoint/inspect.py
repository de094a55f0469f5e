"""What a checkpoint is: layout, dialect, sizes, optimizer; and what is known to go wrong."""

from __future__ import annotations

from collections import defaultdict
from math import prod
from typing import Any

from megatron_moe.tools.checkpoint.model.atoms import WEIGHT
from megatron_moe.tools.checkpoint.model.catalogue import is_buffer
from megatron_moe.tools.checkpoint.read.open import pipeline_of, style_of
from megatron_moe.tools.checkpoint.read.opened import Opened


def facts(opened: Opened) -> dict[str, Any]:
    """Return what there is to know about a checkpoint without reading a tensor."""
    layout, inventory = opened.layout, opened.inventory
    sizes: dict[str, int] = defaultdict(int)
    counts: dict[str, int] = defaultdict(int)
    for atom, held in opened.tensors.atoms.items():
        sizes[atom.role] += held.nbytes
        if not is_buffer(atom.name):
            counts[atom.role] += prod(held.shape)
    experts = inventory.num_experts
    moe_layers = [n for n, layer in sorted(inventory.layers.items()) if layer.num_experts]
    return {
        "folder": str(opened.folder),
        "format": opened.location.form,
        "written by Megatron": f"{opened.dialect} or alike",
        "iteration": opened.common.get("iteration", opened.location.iteration),
        "layout": str(layout),
        "ranks": layout.world_size,
        "layers": len(inventory.layers),
        "layers by stage": _stages(opened),
        "MTP layers": len(inventory.mtp_outer),
        "experts": experts,
        "experts per rank": experts // layout.ep if experts else 0,
        "MoE layers": _ranges(moe_layers),
        "expert keys": style_of(opened).experts if experts else None,
        "norm names": "Transformer Engine" if style_of(opened).fused_norms else "local",
        "layers in torch_dist": _stacking(opened),
        "parameters": counts[WEIGHT],
        "weight types": sorted({h.dtype.name for a, h in opened.tensors.atoms.items()
                                if a.role == WEIGHT and not is_buffer(a.name)}),
        "optimizer": opened.optimizer.kind if opened.optimizer else None,
        "bytes": dict(sizes),
        "files": len(opened.files),
        "bytes on disk": sum(opened.files.values()),
        "random states": len(opened.rng),
        "tensors in no rule": sorted(opened.inventory.unknown),
    }  # fmt: skip


def _stages(opened: Opened) -> list[list[int]]:
    stages = pipeline_of(opened.args, opened.inventory).stages(opened.layout)
    return [[len(stage.layers) for stage in chunks] for chunks in stages]


def _stacking(opened: Opened) -> str | None:
    if opened.location.form == "torch":
        return None
    if opened.singletons:
        return "a tensor for each layer and expert"
    return "one tensor for all" if opened.stacked_layers else "a tensor each"


def _ranges(numbers: list[int]) -> str:
    """``0-3, 5``."""
    parts: list[str] = []
    start = None
    for i, number in enumerate(numbers):
        start = number if start is None else start
        if i + 1 == len(numbers) or numbers[i + 1] != number + 1:
            parts.append(str(start) if start == number else f"{start}-{number}")
            start = None
    return ", ".join(parts) or "none"


def warnings(opened: Opened) -> list[str]:
    """Return what is known to go wrong with checkpoints like this one."""
    found = list(opened.notes)
    layout, args = opened.layout, opened.args
    kind = opened.optimizer.kind if opened.optimizer else None
    if kind == "dp_reshardable":
        found.append(
            "dp_reshardable: Megatron itself can only change DP of this optimizer state; reshard "
            "with --optim fully to be free of that"
        )
    if kind == "fully_sharded_model_space":
        found.append(
            "fully_sharded_model_space: Megatron from 0.16 on cannot read this optimizer state; "
            "reshard it (--dialect 0.19)"
        )
    if kind == "fully_reshardable" and _several_buckets(args, layout):
        found.append(
            "fully_reshardable saved with overlapped gradient reduction (several buckets): up to "
            "0.19.2 Megatron may have written shifted optimizer state (its PR 5077); run "
            "`megatron-moe verify` to know"
        )
    if opened.dialect in ("0.14", "0.16") and layout.ep > 1 and opened.rng:
        found.append("random states under the keys of 0.16: Megatron 0.19 needs --no-load-rng")
    return found


def _several_buckets(args: Any, layout: Any) -> bool:
    return bool(getattr(args, "overlap_grad_reduce", False)) and layout.dp > 1
