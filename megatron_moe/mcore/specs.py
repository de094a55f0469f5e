"""Megatron's own layer specs, with our layer in the place of each MoE layer.

Attention, norms and the pipeline layout stay Megatron's. Both names can be given to ``--spec``::

    --spec megatron_moe.mcore.specs gpt_block_spec
    --spec megatron_moe.mcore.specs hybrid_stack_spec
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.models.hybrid import hybrid_layer_specs
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoELayer
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe.config import MoEConfig, MoEConfigError
from megatron_moe.experts.grouped import GroupedExperts
from megatron_moe.experts.sequential import SequentialExperts
from megatron_moe.layer import MoELayer
from megatron_moe.route.router import TopKRouter
from megatron_moe.telemetry.tracker import install_tracker


def gpt_block_spec(
    config: Any, vp_stage: int | None = None, *, moe: MoEConfig | None = None
) -> Any:
    """The decoder block of a GPT, with our layer at every MoE layer.

    Args:
        config: A ``GPTModelConfig`` (what Megatron hands to a callable ``--spec``) or a
            ``TransformerConfig``.
        vp_stage: Virtual pipeline stage.
        moe: The plugin's options; the defaults when None.

    Returns:
        Megatron's ``TransformerBlockSubmodules``.
    """
    transformer: TransformerConfig = getattr(config, "transformer", config)
    install_tracker(transformer, moe or MoEConfig())  # every pipeline stage comes by here
    block = get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=transformer.transformer_impl == "transformer_engine",
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )
    layers = [with_moe_layer(spec, moe) for spec in block.layer_specs]
    return replace(block, layer_specs=layers)


def with_moe_layer(layer_spec: ModuleSpec, moe: MoEConfig | None = None) -> ModuleSpec:
    """The same layer spec with our MoE layer; a layer without experts is returned as it is."""
    mlp = getattr(layer_spec.submodules, "mlp", None)
    if not (isinstance(mlp, partial) and mlp.func is MegatronMoELayer):
        return layer_spec
    moe = moe or MoEConfig()
    stock: MoESubmodules = mlp.keywords["submodules"]
    experts = stock.experts
    if isinstance(experts, partial) and experts.func is SequentialMLP:
        # Megatron's plain experts; Transformer Engine's grouped ones stay as they are.
        experts = partial(build_experts, moe=moe, **experts.keywords)
    out = copy(layer_spec)
    ours = replace(stock, router=partial(TopKRouter, moe=moe), experts=experts)
    mlp = partial(MoELayer, submodules=ours, moe=moe)
    out.submodules = replace(layer_spec.submodules, mlp=mlp)
    return out


def build_experts(
    num_local_experts: int,
    config: TransformerConfig,
    *,
    submodules: Any,
    moe: MoEConfig,
    pg_collection: Any = None,
    name: str | None = None,
) -> SequentialExperts | GroupedExperts:
    """Stacked experts with ``moe_grouped_gemm``, else one expert after another.

    Raises:
        MoEConfigError: FP8 or FP4 is asked for, and Megatron's spec has no experts for it.
    """
    if config.moe_grouped_gemm:
        if config.fp8 or config.fp4:
            raise MoEConfigError(
                "fp8 or fp4 with moe_grouped_gemm needs Transformer Engine's grouped experts, and "
                "what is installed has none: install 1.11 or newer, or drop --moe-grouped-gemm"
            )
        return GroupedExperts(
            num_local_experts,
            config,
            pg_collection=pg_collection,
            name=name,
            moe=moe,
        )
    return SequentialExperts(num_local_experts, config, submodules, pg_collection, name)


def hybrid_block_spec(moe: MoEConfig | None = None) -> ModuleSpec:
    """The stack of a ``HybridModel`` with our MoE layer.

    Megatron's own stack is made of Transformer Engine modules only. Without Transformer Engine
    attention and MoE layers are taken from the local GPT layer, cut in two; the other kinds of
    layer (Mamba, MLA, …) stay Megatron's and say themselves what they lack.
    """
    stock = hybrid_layer_specs.hybrid_stack_spec
    moe_layer, attention_layer = stock.submodules.moe_layer, stock.submodules.attention_layer
    if not HAVE_TE:
        local = get_gpt_layer_local_spec(num_experts=1)  # the number is read from the config
        attention_layer = copy(local)
        attention_layer.submodules = replace(
            local.submodules,
            pre_mlp_layernorm=IdentityOp,
            mlp=IdentityOp,
            mlp_bda=IdentityFuncOp,
        )
        moe_layer = copy(local)
        moe_layer.submodules = replace(
            local.submodules,
            input_layernorm=IdentityOp,
            self_attention=IdentityOp,
            self_attn_bda=IdentityFuncOp,
        )
    submodules = replace(
        stock.submodules, attention_layer=attention_layer, moe_layer=with_moe_layer(moe_layer, moe)
    )
    out = copy(stock)
    out.submodules = submodules
    return out


hybrid_stack_spec = hybrid_block_spec()
