"""What the experts' options cannot do together: every fault that a user can cause, by name.

Nothing here imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_moe.config import MoEConfig


def expert_faults(c: Any, moe: MoEConfig) -> list[str]:
    """One line for each fault, naming option, value, rule and the way out.

    Args:
        c: A ``TransformerConfig``, or anything with its attributes.
        moe: The plugin's options.
    """
    faults = [*_engine_faults(c), *_emulation_faults(c, moe), *_recompute_faults(c, moe)]
    if moe.expert_tf32 and (uses_engine(c) or not c.moe_grouped_gemm):
        faults.append(
            "expert_tf32 is for the plugin's stacked experts: use --transformer-impl local "
            "--moe-grouped-gemm, or set NVIDIA_TF32_OVERRIDE=1 for everything"
        )
    return faults


def uses_engine(c: Any) -> bool:
    """Whether the layer spec's experts are made of Transformer Engine's modules."""
    return getattr(c, "transformer_impl", None) == "transformer_engine"


def _engine_faults(c: Any) -> list[str]:
    faults = []
    for option in ("fp8", "fp4"):
        value = getattr(c, option, None)
        if value and not uses_engine(c):
            faults.append(
                f"{option} = {value!r} needs Transformer Engine's experts: use --transformer-impl "
                "transformer_engine on a GPU, or --moe-fp8-emulate to see on any device what it "
                "does to the loss"
            )
    interleave = getattr(c, "moe_mlp_glu_interleave_size", None)
    if interleave and not (uses_engine(c) and c.moe_grouped_gemm):
        faults.append(
            f"moe_mlp_glu_interleave_size ({interleave}) is honoured by Transformer Engine's "
            "grouped experts only: drop it, or use --transformer-impl transformer_engine "
            "--moe-grouped-gemm"
        )
    return faults


def _emulation_faults(c: Any, moe: MoEConfig) -> list[str]:
    recipe = moe.fp8_emulate
    if recipe == "none":
        if moe.fp8_emulate_format != "recipe":
            return [
                f"fp8_emulate_format = {moe.fp8_emulate_format!r} without fp8_emulate does "
                "nothing: add --moe-fp8-emulate"
            ]
        return []
    faults = []
    if getattr(c, "fp8", None) or getattr(c, "fp4", None):
        faults.append(f"fp8_emulate = {recipe!r} beside fp8 or fp4: drop one of them")
    if uses_engine(c):
        faults.append(
            f"fp8_emulate = {recipe!r} emulates in the plugin's own experts: use "
            "--transformer-impl local, or --fp8-format for the real thing"
        )
    if not c.moe_grouped_gemm:
        faults.append(f"fp8_emulate = {recipe!r} needs stacked experts: add --moe-grouped-gemm")
    return faults


def _recompute_faults(c: Any, moe: MoEConfig) -> list[str]:
    if not moe.recompute_experts:
        return []
    if c.recompute_granularity == "full":
        return [
            "recompute_experts with recompute_granularity = 'full' would compute them three "
            "times: drop --moe-recompute-experts"
        ]
    clash = {"moe", "moe_act"} & set(c.recompute_modules or ())
    if c.recompute_granularity == "selective" and clash:
        return [
            f"recompute_experts with {sorted(clash)[0]!r} in recompute_modules would compute "
            "parts of them three times: drop one of the two"
        ]
    return []
