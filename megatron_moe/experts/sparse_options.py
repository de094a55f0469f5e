"""What the options of 2:4 sparse experts cannot do together. Nothing here imports torch."""

from __future__ import annotations

from typing import Any

_GROUP = 4


def sparse_faults(transformer: Any, moe: Any) -> list[str]:
    """One line for each fault, naming option, value, rule and the way out.

    Args:
        transformer: A ``TransformerConfig``, or anything with its attributes.
        moe: The plugin's ``MoEConfig``.
    """
    if moe.sparse_experts == "none":
        return _idle_faults(moe)
    return [
        *_place_faults(transformer, moe),
        *_shape_faults(transformer),
        *_schedule_faults(moe),
    ]


def _idle_faults(moe: Any) -> list[str]:
    return [
        f"{option} ({value}) without sparse_experts does nothing: add --moe-sparse-experts 2:4"
        for option, idle in (("sparse_start_iter", 0), ("sparse_freeze_iter", -1))
        if (value := getattr(moe, option)) != idle
    ]


def _place_faults(c: Any, moe: Any) -> list[str]:
    what, faults = f"sparse_experts ({moe.sparse_experts})", []
    if moe.layer_impl != "plugin":
        faults.append(
            f"{what} is the plugin's, and moe_layer_impl is {moe.layer_impl}: use "
            "--moe-layer-impl plugin"
        )
    if getattr(c, "transformer_impl", None) == "transformer_engine":
        faults.append(
            f"{what} is trained in the plugin's own experts, not in Transformer Engine's: use "
            "--transformer-impl local"
        )
    if not c.moe_grouped_gemm:
        faults.append(f"{what} needs stacked experts: add --moe-grouped-gemm")
    return faults


def _shape_faults(c: Any) -> list[str]:
    faults = []
    if c.hidden_size % _GROUP:
        faults.append(
            f"hidden_size ({c.hidden_size}) must be a multiple of {_GROUP} with sparse_experts"
        )
    etp = c.expert_tensor_parallel_size or 1
    ffn = c.moe_ffn_hidden_size or c.ffn_hidden_size
    if ffn % (_GROUP * etp):
        faults.append(
            f"moe_ffn_hidden_size ({ffn}) must be a multiple of {_GROUP} times "
            f"expert_tensor_parallel_size ({etp}) with sparse_experts: groups of four do not "
            "cross ranks"
        )
    return faults


def _schedule_faults(moe: Any) -> list[str]:
    faults = []
    start, freeze, decay = moe.sparse_start_iter, moe.sparse_freeze_iter, moe.sparse_decay
    if start < 0:
        faults.append(f"sparse_start_iter ({start}) must be 0 or more")
    if 0 <= freeze < start or freeze < -1:
        faults.append(
            f"sparse_freeze_iter ({freeze}) must be -1 (never), or not before sparse_start_iter "
            f"({start})"
        )
    if not decay >= 0:
        faults.append(f"sparse_decay ({decay:g}) must be 0 or more")
    return faults
