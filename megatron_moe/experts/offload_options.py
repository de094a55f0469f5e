"""What offloaded experts cannot be combined with. Nothing here imports torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from megatron_moe.experts.options import uses_engine

if TYPE_CHECKING:
    from megatron_moe.config import MoEConfig


def offload_faults(c: Any, moe: MoEConfig) -> list[str]:
    """One line for each fault, naming option, value, rule and the way out.

    Args:
        c: A ``TransformerConfig``, or anything with its attributes.
        moe: The plugin's options.
    """
    if moe.expert_offload == "none":
        return [
            f"{option} = {value!r} without expert_offload does nothing: "
            "add --moe-expert-offload file"
            for option in ("offload_dir", "offload_optimizer")
            if (value := getattr(moe, option))
        ]
    return [*_own_faults(moe), *_foreign_faults(c, moe)]


def _own_faults(moe: MoEConfig) -> list[str]:
    faults = []
    if not moe.offload_dir:
        faults.append("expert_offload = 'file' needs a folder: add --moe-offload-dir")
    if moe.offload_cache < 1:
        faults.append(f"offload_cache = {moe.offload_cache} must be 1 or more")
    if moe.expert_gemm not in ("auto", "loop"):
        faults.append(
            f"expert_gemm = {moe.expert_gemm!r} needs all experts at once, expert_offload has one "
            "at a time: use auto or loop"
        )
    for option in ("fp8_emulate", "sparse_experts"):
        if (value := getattr(moe, option)) != "none":
            faults.append(
                f"{option} = {value!r} reads all experts' weights at once, which expert_offload is "
                "to avoid: drop one of the two"
            )
    return faults


def _foreign_faults(c: Any, moe: MoEConfig) -> list[str]:
    faults = []
    stacked = c.moe_grouped_gemm and not uses_engine(c) and moe.layer_impl == "plugin"
    if not stacked:
        faults.append(
            "expert_offload = 'file' needs the plugin's stacked experts: use --moe-layer-impl "
            "plugin --transformer-impl local --moe-grouped-gemm"
        )
    if _cuda_is_used():
        faults.append(
            "expert_offload = 'file' is proven on the CPU only, its copies know no streams: use "
            "--device cpu, or more expert-parallel ranks, or Megatron's --optimizer-cpu-offload"
        )
    if getattr(c, "init_model_with_meta_device", False):
        faults.append(
            "init_model_with_meta_device makes weights without memory, expert_offload makes them "
            "in a file: drop one of the two"
        )
    if getattr(c, "mtp_use_repeated_layer", False):
        faults.append(
            "mtp_use_repeated_layer sums the gradients of an expert's uses before they are added, "
            "expert_offload adds each: drop one of the two"
        )
    return faults


def _cuda_is_used() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available()
