"""What in the options of routing cannot work together, found before anything is built."""

from __future__ import annotations

import logging
from typing import Any

from megatron_moe.route.balance import MEGATRON_LOSSES, balance_losses
from megatron_moe.route.choice import Choice, choice_named, name_of_choice

_CHOOSING = ("sinkhorn", "quantile_balancing")
_log = logging.getLogger(__name__)
_warned: set[str] = set()


def routing_faults(config: Any, moe: Any) -> list[str]:
    """Every fault, one sentence each with option, value, rule and the way out.

    Args:
        config: A ``TransformerConfig`` (or anything with its attributes).
        moe: The plugin's ``MoEConfig``.
    """
    faults = _group_faults(config) + _balance_faults(config, moe) + _capacity_faults(config, moe)
    faults += _stability_faults(config, moe)
    try:
        name = name_of_choice(config, moe)
        choice = choice_named(name)
    except ValueError as fault:
        return [*faults, str(fault)]
    faults += choice.faults(config, moe)
    faults += [
        f"{option} ({value}) has no effect with router_choice {name}: drop "
        f"--{option.replace('_', '-')}"
        for option in choice.ignores
        if (value := getattr(config, option))
    ]
    if moe.hysteresis_margin and not choice.ranks_with_bias:
        faults.append(
            f"hysteresis_margin ({moe.hysteresis_margin:g}) would do nothing with router_choice "
            f"{name}, which does not rank experts by scores: drop it"
        )
    if moe.probe_tokens and not choice.decides_alone:
        faults.append(
            f"probe_tokens ({moe.probe_tokens}) decides about tokens by themselves, which "
            f"router_choice {name} cannot: drop --moe-probe-tokens"
        )
    if getattr(config, "moe_enable_routing_replay", False) and name not in ("topk", "switch"):
        faults.append(
            f"moe_enable_routing_replay knows K experts a token, which router_choice {name} does "
            "not always give: use --moe-routing-record and --moe-routing-replay"
        )
    if choice.balanced and _losses(config, moe):
        faults.append(
            f"router_choice {name} balances by itself, so a balancing loss would only pull at "
            "scores that choose nothing: drop --moe-aux-loss-coeff and --moe-balance-losses"
        )
    inherits = choice.weigh is Choice.weigh
    if inherits and config.moe_router_topk == 1 and _late_softmax(config):
        faults.append(
            "moe_router_topk 1 with a softmax after the choice weighs every token with 1, so that "
            "the router learns nothing from the model's loss: add --moe-router-pre-softmax"
        )
    return faults


def warn_if_unbalanced(config: Any, moe: Any) -> None:
    """Say once that nothing balances the experts, where nobody asked for that.

    Megatron's defaults are ``aux_loss`` with a coefficient of 0.
    """
    kinds = _kinds(config)
    balanced = choice_named(name_of_choice(config, moe)).balanced or _losses(config, moe)
    if balanced or config.moe_router_enable_expert_bias or kinds == ["none"]:
        return
    text = (
        f"no balancing: moe_router_load_balancing_type {' '.join(kinds)} has moe_aux_loss_coeff 0, "
        "so experts may die; add --moe-aux-loss-coeff 0.01, or --moe-router-load-balancing-type "
        "none to say that this is meant"
    )
    if text not in _warned:
        _warned.add(text)
        _log.warning(text)


def _kinds(config: Any) -> list[str]:
    kinds = config.moe_router_load_balancing_type
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _losses(config: Any, moe: Any) -> list[Any]:
    try:
        return balance_losses(config, moe)
    except ValueError:
        return []


def _late_softmax(config: Any) -> bool:
    return config.moe_router_score_function == "softmax" and not config.moe_router_pre_softmax


def _group_faults(c: Any) -> list[str]:
    faults = []
    num_experts, topk = c.num_moe_experts, c.moe_router_topk
    if not 1 <= topk <= num_experts:
        faults.append(
            f"moe_router_topk ({topk}) must be between 1 and num_moe_experts ({num_experts})"
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


def _balance_faults(c: Any, moe: Any) -> list[str]:
    faults = []
    coeffs = c.moe_aux_loss_coeff
    coeffs = coeffs if isinstance(coeffs, list) else [coeffs] * len(_kinds(c))
    known = (*MEGATRON_LOSSES, *_CHOOSING, "none")
    for kind, coeff in zip(_kinds(c), coeffs, strict=False):
        if kind not in known:
            faults.append(
                f"moe_router_load_balancing_type ({kind}) must be one of {', '.join(known)}; "
                "other losses go into --moe-balance-losses"
            )
        elif coeff and kind not in MEGATRON_LOSSES:
            faults.append(
                f"moe_aux_loss_coeff ({coeff:g}) does nothing with moe_router_load_balancing_type "
                f"{kind}: drop it, or choose aux_loss, seq_aux_loss or global_aux_loss"
            )
    try:
        balance_losses(c, moe)
    except ValueError as fault:
        faults.append(str(fault))
    layers = c.num_layers + (c.mtp_num_layers or 0)
    if moe.balance_layer_weights and len(moe.balance_layer_weights) != layers:
        faults.append(
            f"balance_layer_weights has {len(moe.balance_layer_weights)} values; it needs one for "
            f"each of the {layers} layers, those of multi-token prediction last"
        )
    return faults


def _capacity_faults(c: Any, moe: Any) -> list[str]:
    faults = []
    factor, padded = c.moe_expert_capacity_factor, c.moe_pad_expert_input_to_capacity
    ours = {
        "eval_capacity_factor": moe.eval_capacity_factor,
        "min_capacity": moe.min_capacity,
        "drop_order": moe.drop_order != "policy" and moe.drop_order,
    }
    for option, value in ours.items():
        if value and factor is None:
            faults.append(
                f"{option} ({value}) does nothing without moe_expert_capacity_factor: add "
                "--moe-expert-capacity-factor"
            )
    if moe.min_capacity < 0 or moe.eval_capacity_factor < 0:
        faults.append(
            f"min_capacity ({moe.min_capacity}) and eval_capacity_factor "
            f"({moe.eval_capacity_factor:g}) must not be negative"
        )
    if padded and moe.capacity_scope in ("micro_batch", "global"):
        faults.append(
            f"capacity_scope {moe.capacity_scope} cannot be padded to capacity, since every rank "
            "would have to send each expert the rows of all: use --moe-capacity-scope rank"
        )
    if factor is not None and c.moe_token_drop_policy not in ("probs", "position"):
        faults.append(
            f"moe_token_drop_policy ({c.moe_token_drop_policy}) must be probs or position; "
            "--moe-drop-order has random and prioritised"
        )
    return faults


def _stability_faults(c: Any, moe: Any) -> list[str]:
    faults = []
    for option in ("logit_noise_std", "noise_anneal_iters", "gate_pretrain_iters", "probe_tokens"):
        if getattr(moe, option) < 0:
            faults.append(f"{option} ({getattr(moe, option)}) must not be negative")
    if moe.sinkhorn_iterations < 1:
        faults.append(f"sinkhorn_iterations ({moe.sinkhorn_iterations}) must be at least 1")
    if moe.gate_pretrain_iters and not (
        moe.gate_distill_coeff or c.moe_z_loss_coeff or _losses(c, moe)
    ):
        faults.append(
            f"gate_pretrain_iters ({moe.gate_pretrain_iters}) leaves the router nothing to learn "
            "from: give --moe-gate-distill-coeff, or a balancing loss"
        )
    if moe.gate_pretrain_iters and c.pipeline_model_parallel_size > 1:
        faults.append(
            f"gate_pretrain_iters ({moe.gate_pretrain_iters}) holds all weights but the routers', "
            "and a pipeline stage without routers would go on learning: "
            f"pipeline_model_parallel_size ({c.pipeline_model_parallel_size}) must be 1"
        )
    if moe.hysteresis_margin and c.pipeline_model_parallel_size > 1:
        faults.append(
            f"hysteresis_margin ({moe.hysteresis_margin:g}) needs the token ids, which only the "
            "first pipeline stage has: pipeline_model_parallel_size "
            f"({c.pipeline_model_parallel_size}) must be 1"
        )
    if moe.hysteresis_margin and c.context_parallel_size > 1:
        faults.append(
            f"hysteresis_margin ({moe.hysteresis_margin:g}) needs the tokens before each one, of "
            f"which context_parallel_size ({c.context_parallel_size}) leaves a rank pieces: "
            "context_parallel_size must be 1"
        )
    if moe.context_length < 1:
        faults.append(f"context_length ({moe.context_length}) must be at least 1")
    if moe.routing_verify and not moe.routing_replay:
        faults.append("routing_verify needs the folder of a record: add --moe-routing-replay")
    return faults
