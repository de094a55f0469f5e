"""A small GPT with a recompute setting, and the account of its memory.

Imports Megatron: only for processes in which the plugin is active.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.config import MoEConfig
from megatron_moe.layer import MoELayer
from megatron_moe.mcore.specs import gpt_block_spec
from megatron_moe.mcore.token_ids import feed_token_ids
from megatron_moe.tools.bench.live_bytes import LiveBytes
from megatron_moe.tools.bench.memory_process import MemoryJob, Setting


class SmallGPT:
    """A model, a batch for it, and its steps.

    Args:
        job: Sizes.
        setting: What it computes again.
        plugin: Our MoE layer, or upstream's.
        like: Whose weights it has; drawn when None.
    """

    def __init__(
        self, job: MemoryJob, setting: Setting, *, plugin: bool, like: SmallGPT | None
    ) -> None:
        self.device = job.device
        torch.manual_seed(1)
        config = _config(job, setting, grouped=plugin)
        if plugin:
            spec = gpt_block_spec(config, moe=MoEConfig(**setting.moe))
        else:
            spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
        self.model = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=job.vocabulary,
            max_sequence_length=job.sequence,
            position_embedding_type="rope",
        ).to(job.device)
        if plugin:
            feed_token_ids(self.model)
        if like is not None:
            self.model.load_state_dict(like.model.state_dict(), strict=False)
        self.model.train()
        torch.manual_seed(2)
        text_BS = torch.randint(job.vocabulary, (job.batch, job.sequence + 1), device=job.device)
        self.tokens_BS, self.labels_BS = text_BS[:, :-1], text_BS[:, 1:]
        self.positions_BS = torch.arange(job.sequence, device=job.device).expand_as(self.tokens_BS)

    def forward(self) -> Tensor:
        """The mean loss of the batch."""
        return self.model(self.tokens_BS, self.positions_BS, None, labels=self.labels_BS).mean()

    def step(self) -> None:
        """Forward and backward, into gradients that are kept."""
        self.model.zero_grad(set_to_none=False)
        self.forward().backward()
        get_moe_metrics_tracker().clear()

    def results(self) -> dict[str, Tensor]:
        """Loss and gradients of a step."""
        self.model.zero_grad(set_to_none=False)
        loss = self.forward()
        loss.backward()
        found = {"loss": loss.detach()}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.clone()
        return found

    def difference(self, expected: dict[str, Tensor]) -> float:
        """Largest difference of loss and gradients, relative to the largest value of each."""
        found = self.results()
        common = found.keys() & expected.keys()
        worst = [
            ((found[key] - expected[key]).abs().max() / expected[key].abs().max()).item()
            for key in common
            if expected[key].count_nonzero()
        ]
        return max(worst) if all(one == one for one in worst) else float("nan")

    def account(self) -> dict[str, Any]:
        """Count one step's bytes.

        Returns:
            ``held`` at the end of forward by the phase that made it, ``rises`` of each phase,
            ``forward_peak`` and ``backward_peak``, and on CUDA the allocator's ``allocator_peak``.
        """
        self.model.zero_grad(set_to_none=False)
        meter = LiveBytes()
        self._watch(meter)
        gc.collect()  # what earlier steps left in cycles would be freed while this one is counted
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with meter:
            loss = self.forward()
            found: dict[str, Any] = {"held": dict(meter.by_phase), "rises": dict(meter.rises)}
            found["forward_peak"] = meter.peak
            meter.reset_peak()
            with meter.phase("backward"):
                loss.backward()
            found["backward_peak"] = meter.peak
        self._unwatch()
        get_moe_metrics_tracker().clear()
        if self.device == "cuda":
            found["allocator_peak"] = torch.cuda.max_memory_allocated() - before
        return found

    def _watch(self, meter: LiveBytes) -> None:
        for layer in self._moe_layers():
            dispatcher = layer.token_dispatcher
            layer.router.forward = meter.around("route", layer.router.forward)
            dispatcher.dispatch = meter.around("dispatch", dispatcher.dispatch)
            layer.experts.forward = meter.around("experts", layer.experts.forward)
            dispatcher.combine = meter.around("combine", dispatcher.combine)

    def _unwatch(self) -> None:
        for layer in self._moe_layers():
            del layer.router.forward, layer.experts.forward
            del layer.token_dispatcher.dispatch, layer.token_dispatcher.combine

    def _moe_layers(self) -> list[Any]:
        """Ours alone: upstream's has other stages."""
        return [module for module in self.model.modules() if isinstance(module, MoELayer)]


def _config(job: MemoryJob, setting: Setting, *, grouped: bool) -> TransformerConfig:
    fields: dict[str, Any] = {
        "num_layers": job.layers,
        "hidden_size": job.hidden,
        "num_attention_heads": job.heads,
        "ffn_hidden_size": job.ffn,
        "moe_ffn_hidden_size": job.ffn,
        "num_moe_experts": job.experts,
        "moe_router_topk": job.topk,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-2,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": grouped,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "transformer_impl": "local",
        "use_cpu_initialization": job.device == "cpu",
        "params_dtype": torch.float32,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        # Before the model is built: the router adds its end of a global batch to it.
        "finalize_model_grads_func": finalize_model_grads,
    }
    return TransformerConfig(**(fields | dict(setting.model)))
