"""The few knobs that Megatron has not, and the check of those that it has.

A knob that ``TransformerConfig`` has is read from there and never doubled here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LAYER_IMPLS = ("plugin", "megatron")
EXPERT_GEMMS = ("auto", "grouped_mm", "loop", "batched")
FP8_RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")


def _one_of(*choices: str) -> Any:
    return field(default=choices[0], metadata={"choices": choices})


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """Options of the plugin.

    Args:
        layer_impl: Whose MoE layer is built: ``plugin`` (ours) or ``megatron`` (for comparison).
        expert_gemm: How grouped experts multiply without Transformer Engine: ``grouped_mm``
            (torch's grouped GEMM), ``loop`` (one GEMM an expert, any dtype), ``batched`` (all
            padded to the fullest), or ``auto``, by what was measured.
        fp8_emulate: Compute the experts as this FP8 recipe of Transformer Engine would, with its
            rounding and scales, on any device: tensorwise, delayed, blockwise, mxfp8.
        fp8_emulate_format: ``e4m3``, or ``hybrid`` with gradients in e5m2; ``recipe`` takes what
            the recipe has.
        recompute_experts: Compute the experts again in backward from the dispatched rows, instead
            of keeping what is between their layers.
        expert_offload: Where experts' weights lie: on the device (none), or in a ``file``.
        offload_dir: Folder of those files, on a fast disk.
        offload_cache: Experts of each rank that are kept on the device at a time.
        offload_optimizer: Put the experts' gradients and optimizer state into files too.
        sparse_experts: Train experts with ``2:4`` sparse weights: two of any four inputs.
        sparse_start_iter: Iteration from which on they are sparse.
        sparse_freeze_iter: Iteration from which on their masks stay as they are; -1 is never.
        sparse_decay: Decay of the weights that are masked out (SR-STE).
        expert_tf32: Multiply the experts' fp32 matrices in TF32 on GPUs that have it; the router
            stays in fp32.
        router_choice: How tokens get their experts: topk, switch, gshard, expert_choice, hash,
            top_p, threshold, or your own as package.module:Class.
        second_expert: With router_choice gshard, whether the second expert is ``always``
            dispatched or at ``random``, with twice its weight as probability.
        sinkhorn_iterations: Iterations of the sinkhorn choice.
        expert_choice_scope: Whose tokens compete for an expert that chooses: ``micro_batch``,
            each ``sequence`` for itself, or ``global`` (all data-parallel ranks).
        allow_future_tokens: Allow a choice in which later tokens decide about earlier ones;
            for models that are not causal.
        k_min: Fewest experts of a token, for top_p and threshold.
        k_max: Most experts of a token, for top_p and threshold; 0 means twice the top-k.
        target_k: Mean number of experts that is held to; 0 means the top-k, a negative number
            leaves router_cut as it is.
        router_cut: Where top_p and threshold cut (a probability mass, or a score) at the start;
            0 finds it in the first batch.
        budget_loss_coeff: Coefficient of the loss that holds the mean number of experts.
        balance_losses: Balancing losses besides Megatron's own, as NAME@SCOPE=COEFFICIENT: names
            kl, switch or package.module:function; scopes micro_batch, sequence, global.
        balance_layer_weights: A factor on the balancing coefficients of each decoder layer, then
            of each multi-token-prediction layer.
        expert_bias_update: Steps of the expert bias: ``sign``, or ``centred`` to sum to zero.
        eval_capacity_factor: Capacity factor in evaluation; 0 takes that of training.
        min_capacity: Rows that an expert takes whatever its capacity.
        capacity_scope: Whose tokens share an expert's capacity: of a ``rank``, a ``micro_batch``
            (tensor and context parallel ranks), ``global`` (data-parallel ranks too); ``auto`` is
            micro_batch, or rank when experts are padded to capacity.
        drop_order: Who is served first when an expert is full: what Megatron's drop ``policy``
            says, anybody at ``random``, or ``prioritised``: tokens by their best weight.
        logit_noise_std: Standard deviation of noise on the router's logits in training.
        noise_anneal_iters: Iterations over which that noise and Megatron's input jitter fall to
            zero; 0 keeps them.
        gate_pretrain_iters: First iterations, in which only the router learns, from balancing
            and distillation losses; 1000 is a good start, 0 is none.
        gate_distill_coeff: Coefficient of the distillation loss in those iterations.
        router_freeze_iter: Iteration from which on routers no longer learn; -1 is never.
        hysteresis_margin: How much the experts last chosen in the same context are favoured.
        context_length: Tokens that make a context for that.
        probe_tokens: Size of the fixed probe on which churn is measured; 0 is no probe.
        routing_record: Folder into which every decision is recorded.
        routing_replay: Folder of a record whose decisions are taken instead of new ones.
        routing_verify: Compare with the record instead of replaying it, and fail on a difference.
    """

    layer_impl: str = _one_of(*LAYER_IMPLS)
    expert_gemm: str = _one_of(*EXPERT_GEMMS)
    fp8_emulate: str = _one_of("none", *FP8_RECIPES)
    fp8_emulate_format: str = _one_of("recipe", "e4m3", "hybrid")
    recompute_experts: bool = False
    expert_offload: str = _one_of("none", "file")
    offload_dir: str = ""
    offload_cache: int = 4
    offload_optimizer: bool = False
    sparse_experts: str = _one_of("none", "2:4")
    sparse_start_iter: int = 0
    sparse_freeze_iter: int = -1
    sparse_decay: float = 2e-4
    expert_tf32: bool = False
    router_choice: str = "topk"
    second_expert: str = _one_of("always", "random")
    sinkhorn_iterations: int = 20
    expert_choice_scope: str = _one_of("micro_batch", "sequence", "global")
    allow_future_tokens: bool = False
    k_min: int = 1
    k_max: int = 0
    target_k: float = 0.0
    router_cut: float = 0.0
    budget_loss_coeff: float = 0.01
    balance_losses: tuple[str, ...] = ()
    balance_layer_weights: tuple[float, ...] = ()
    expert_bias_update: str = _one_of("sign", "centred")
    eval_capacity_factor: float = 0.0
    min_capacity: int = 0
    capacity_scope: str = _one_of("auto", "rank", "micro_batch", "global")
    drop_order: str = _one_of("policy", "random", "prioritised")
    logit_noise_std: float = 0.0
    noise_anneal_iters: int = 0
    gate_pretrain_iters: int = 0
    gate_distill_coeff: float = 1.0
    router_freeze_iter: int = -1
    hysteresis_margin: float = 0.0
    context_length: int = 4
    probe_tokens: int = 0
    routing_record: str = ""
    routing_replay: str = ""
    routing_verify: bool = False


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
    _Refusal("moe_router_fusion", _is_set, "drop --moe-router-fusion"),
    _Refusal("moe_permute_fusion", _is_set, "drop --moe-permute-fusion"),
    _Refusal("moe_router_force_biased", _is_set, _USE_UPSTREAM),
    _Refusal("moe_router_padding_for_quantization", _is_set, "drop it: the TE experts pad"),
    _Refusal("moe_expert_rank_capacity_factor", _is_set, _USE_UPSTREAM),
    _Refusal("moe_paged_stash", _is_set, _USE_UPSTREAM),
    _Refusal("moe_router_topk_limited_devices", _is_set, "use --moe-router-num-groups"),
    _Refusal("cuda_graph_impl", lambda v: v not in (None, "none"), "use --cuda-graph-impl none"),
    _Refusal("transformer_impl", lambda v: v == "inference_optimized", _USE_UPSTREAM),
    _Refusal(
        "use_transformer_engine_op_fuser",
        _is_set,
        "drop it: it wants counts on the device, and the dispatch plan has them on the host",
    ),
    _Refusal("gtp_weight_remat_size", lambda v: (v or 1) > 1, _USE_UPSTREAM),
    _Refusal(
        "moe_token_dispatcher_type",
        lambda v: v not in ("alltoall", "allgather"),
        "use --moe-token-dispatcher-type alltoall or allgather",
    ),
    _Refusal(
        "offload_modules",
        lambda v: bool({"expert_fc1", "moe_act", "fused_group_mlp"} & set(v or ())),
        _USE_UPSTREAM,
    ),
)


def check(transformer: Any, moe: MoEConfig | None = None) -> None:
    """Find every fault that a user can cause in the MoE part of a model's configuration.

    Args:
        transformer: A ``TransformerConfig`` (or anything with its attributes).
        moe: The plugin's options; the defaults when None.

    Raises:
        MoEConfigError: One line for each fault, naming option, value, rule and the way out.
    """
    # Here, so that reading the options imports no torch.
    from megatron_moe.experts.offload_options import offload_faults
    from megatron_moe.experts.options import expert_faults
    from megatron_moe.experts.sparse_options import sparse_faults
    from megatron_moe.route.options import routing_faults

    moe = moe or MoEConfig()
    faults = [
        f"{r.option} = {value!r} is not honoured by the plugin's MoE layer: {r.way_out}"
        for r in REFUSALS
        if r.refused(value := getattr(transformer, r.option, None))
    ]
    faults += routing_faults(transformer, moe) + expert_faults(transformer, moe)
    faults += sparse_faults(transformer, moe) + offload_faults(transformer, moe)
    faults += _layout_faults(transformer)
    if faults:
        raise MoEConfigError("\n".join(faults))


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
