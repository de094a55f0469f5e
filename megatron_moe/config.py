"""The few knobs that Megatron has not, and the check of those that it has.

A knob that ``TransformerConfig`` has is read from there and never doubled here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LAYER_IMPLS = ("plugin", "megatron")
EXPERT_GEMMS = ("auto", "grouped_mm", "loop")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """Options of the plugin.

    Args:
        layer_impl: Whose MoE layer is built: ``plugin`` (ours) or ``megatron`` (for comparison).
        expert_gemm: How grouped experts multiply without Transformer Engine: ``grouped_mm``
            (torch's grouped GEMM), ``loop`` (one GEMM an expert, any dtype), or ``auto``.
    """

    layer_impl: str = field(default="plugin", metadata={"choices": LAYER_IMPLS})
    expert_gemm: str = field(default="auto", metadata={"choices": EXPERT_GEMMS})


class MoEConfigError(ValueError):
    """One or more options that cannot work together; the message lists them all."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    """An option of Megatron that this plugin does not honour: refused by name, never ignored."""

    option: str
    refused: Any  # a predicate over the option's value
    way_out: str


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


_USE_UPSTREAM = "use --moe-layer-impl megatron for it"

REFUSALS = (
    _Refusal("overlap_moe_expert_parallel_comm", _is_set, _USE_UPSTREAM),
    _Refusal("overlap_dispatch_backward_with_experts_wgrad", _is_set, _USE_UPSTREAM),
    _Refusal("delay_wgrad_compute", _is_set, _USE_UPSTREAM),
    _Refusal("moe_shared_expert_overlap", _is_set, "drop --moe-shared-expert-overlap"),
    _Refusal("moe_latent_size", _is_set, _USE_UPSTREAM),
    _Refusal("moe_enable_routing_replay", _is_set, _USE_UPSTREAM),
    _Refusal("moe_router_fusion", _is_set, "drop --moe-router-fusion"),
    _Refusal("moe_permute_fusion", _is_set, "drop --moe-permute-fusion"),
    _Refusal("moe_router_force_biased", _is_set, _USE_UPSTREAM),
    _Refusal("moe_router_padding_for_quantization", _is_set, "drop it: the TE experts pad"),
    _Refusal("moe_expert_rank_capacity_factor", _is_set, _USE_UPSTREAM),
    _Refusal("moe_paged_stash", _is_set, _USE_UPSTREAM),
    _Refusal("moe_router_topk_limited_devices", _is_set, "use --moe-router-num-groups"),
    _Refusal("cuda_graph_impl", lambda v: v not in (None, "none"), "use --cuda-graph-impl none"),
    _Refusal("transformer_impl", lambda v: v == "inference_optimized", _USE_UPSTREAM),
    _Refusal("gtp_weight_remat_size", lambda v: (v or 1) > 1, _USE_UPSTREAM),
    _Refusal("fp8", _is_set, _USE_UPSTREAM),
    _Refusal("fp4", _is_set, _USE_UPSTREAM),
    _Refusal(
        "moe_token_dispatcher_type",
        lambda v: v not in ("alltoall", "allgather"),
        "use --moe-token-dispatcher-type alltoall or allgather",
    ),
    _Refusal(
        "recompute_modules",
        lambda v: "moe_act" in (v or ()),
        "use --recompute-modules moe, which recomputes the whole layer",
    ),
    _Refusal(
        "offload_modules",
        lambda v: bool({"expert_fc1", "moe_act", "fused_group_mlp"} & set(v or ())),
        _USE_UPSTREAM,
    ),
)

BALANCING_TYPES = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")


def check(transformer: Any) -> None:
    """Find every fault that a user can cause in the MoE part of a model's configuration.

    Args:
        transformer: A ``TransformerConfig`` (or anything with its attributes).

    Raises:
        MoEConfigError: One line for each fault, naming option, value, rule and the way out.
    """
    faults = [
        f"{r.option} = {value!r} is not honoured by the plugin's MoE layer: {r.way_out}"
        for r in REFUSALS
        if r.refused(value := getattr(transformer, r.option, None))
    ]
    faults += _routing_faults(transformer) + _layout_faults(transformer)
    if faults:
        raise MoEConfigError("\n".join(faults))


def _routing_faults(c: Any) -> list[str]:
    faults = []
    num_experts, topk = c.num_moe_experts, c.moe_router_topk
    if not 1 <= topk <= num_experts:
        faults.append(
            f"moe_router_topk ({topk}) must be between 1 and num_moe_experts ({num_experts})"
        )
    kinds = c.moe_router_load_balancing_type
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if unknown := [k for k in kinds if k not in BALANCING_TYPES]:
        faults.append(
            f"moe_router_load_balancing_type {unknown} is not honoured by the plugin's MoE layer; "
            f"use some of {', '.join(BALANCING_TYPES)}, or --moe-layer-impl megatron"
        )
    groups, group_topk = c.moe_router_num_groups, c.moe_router_group_topk
    if group_topk and (not groups or num_experts % groups or group_topk > groups):
        faults.append(
            f"moe_router_group_topk ({group_topk}) needs moe_router_num_groups ({groups}) that "
            f"divides num_moe_experts ({num_experts}) and is not smaller"
        )
    elif group_topk and (topk % group_topk or topk // group_topk > num_experts // groups):
        faults.append(
            f"moe_router_topk ({topk}) must be a multiple of moe_router_group_topk ({group_topk}), "
            f"with at most {num_experts // groups} experts taken from a group"
        )
    return faults


def _layout_faults(c: Any) -> list[str]:
    faults = []
    ep = c.expert_model_parallel_size
    if c.num_moe_experts % ep:
        below = c.num_moe_experts // ep * ep
        legal = " or ".join(str(n) for n in (below, below + ep) if n)
        faults.append(
            f"num_moe_experts ({c.num_moe_experts}) must be a multiple of "
            f"expert_model_parallel_size ({ep}); use {legal}"
        )
    if c.tensor_model_parallel_size > 1 and not c.sequence_parallel:
        faults.append(
            f"tensor_model_parallel_size ({c.tensor_model_parallel_size}) with MoE needs "
            "sequence_parallel, or every TP rank routes the same tokens; add --sequence-parallel"
        )
    return faults
