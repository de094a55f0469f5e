"""Megatron inside a worker: parallel state of a layout, a small configuration, a small GPT.

Imports Megatron, so only functions that run in the workers (or under an activated CPU backend) may
import this file.
"""

from collections.abc import Callable
from typing import Any

import torch
from helpers.canonical import AxisPlaces, load_canonical
from helpers.layout import Layout
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe.config import MoEConfig
from megatron_moe.mcore.token_ids import feed_token_ids

VOCABULARY = 32


def enter_layout(layout: Layout) -> AxisPlaces:
    """Initialise Megatron's parallel state and random states; the pool undoes it after the call."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,  # every group is gloo already
    )
    model_parallel_cuda_manual_seed(123, force_reset_rng=True)
    return AxisPlaces(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=layout.tp,
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp_size=layout.etp,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
    )


def moe_config(layout: Layout, **changes: Any) -> TransformerConfig:
    """Return the configuration of a small MoE transformer; ``changes`` are any of its fields."""
    fields: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "ffn_hidden_size": 24,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 12,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.1,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.tp > 1,
        "params_dtype": torch.float32,
        "pipeline_dtype": changes.get("params_dtype", torch.float32) if layout.pp > 1 else None,
        # Two stages are each other's next and previous: batched sends would be mixed up.
        "overlap_p2p_comm": layout.vpp is not None,
        "batch_p2p_comm": layout.vpp is None,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**(fields | changes))


def block_spec_builder(impl: str, moe: MoEConfig | None = None) -> Callable:
    """Return ``(config, vp_stage) -> spec`` with the MoE layer of ``impl``.

    Args:
        impl: ``megatron`` for upstream's layer, ``plugin`` for ours.
        moe: The plugin's own options; the defaults when None.
    """
    if impl == "megatron":
        return lambda config, vp_stage: get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, vp_stage=vp_stage
        )
    from megatron_moe.mcore.specs import gpt_block_spec

    return lambda config, vp_stage: gpt_block_spec(config, vp_stage=vp_stage, moe=moe)


def build_gpt(
    config: TransformerConfig,
    places: AxisPlaces,
    *,
    impl: str,
    moe: MoEConfig | None = None,
    sequence_length: int,
    empty_experts: tuple[int, ...] = (),
) -> list[GPTModel]:
    """Build this rank's model chunks with canonical weights."""
    chunks = []
    stages = config.virtual_pipeline_model_parallel_size
    for vp_stage in range(stages) if stages else [None]:
        ends = {"ignore_virtual": False, "vp_stage": vp_stage}
        model = GPTModel(
            config=config,
            transformer_layer_spec=block_spec_builder(impl, moe)(config, vp_stage),
            vocab_size=VOCABULARY,
            max_sequence_length=sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(**ends),
            post_process=parallel_state.is_pipeline_last_stage(**ends),
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        if impl == "plugin":
            feed_token_ids(model)
        chunks.append(model)
    load_canonical(chunks, places, gated=config.gated_linear_unit, empty_experts=empty_experts)
    return chunks
