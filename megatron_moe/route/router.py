"""The router that Megatron sees: gate, decision, losses, counts."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import apply_random_logits, router_gating_linear
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_moe.parallel.groups import ExpertGroups
from megatron_moe.route.capacity import capacity_of, within_capacity
from megatron_moe.route.losses import BalanceLosses
from megatron_moe.route.scores import Routing, choose, count_choices

_ROUTER_DTYPES = {None: torch.float32, "fp32": torch.float32, "fp64": torch.float64}


class TopKRouter(Router):
    """Route each token to K experts.

    Parameter and buffer names are Megatron's (``weight``, ``bias``, ``expert_bias``). The gate is
    computed in fp32 unless ``moe_router_dtype`` says fp64: half-precision logits flip near-ties.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: Any = None, is_mtp_layer: bool = False
    ) -> None:
        super().__init__(config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.topk = config.moe_router_topk
        self.frozen_expert_bias = False
        self.expert_bias: Tensor | None
        self.local_tokens_per_expert: Tensor | None
        biased = config.moe_router_enable_expert_bias
        zeros_E = torch.zeros(self.num_experts, device=self.weight.device)
        self.register_buffer("expert_bias", zeros_E if biased else None)
        # int64: half-precision (or large fp32) counts would round and flip the bias update.
        counts_E = zeros_E.long() if biased else None
        self.register_buffer("local_tokens_per_expert", counts_E, persistent=False)
        self.losses = BalanceLosses(config, ExpertGroups.from_collection(pg_collection))
        self.load = torch.zeros(self.num_experts, dtype=torch.int64)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Decide.

        Args:
            input: Hidden states, ``(S, B, D)``.
            padding_mask: True for padding, ``(S, B)``; such tokens go to no expert and are in no
                count, capacity or loss.

        Returns:
            The decision for the S · B tokens in sequence-major order.
        """
        logits_SBE = self.gating(self._jitter(input))
        if self.config.moe_router_force_load_balancing:
            logits_SBE = apply_random_logits(logits_SBE)
        logits_TE = logits_SBE.flatten(0, 1)
        valid_T = None if padding_mask is None else ~padding_mask.flatten()
        probs_TK, indices_TK = self._choose(logits_TE)
        if self.training and torch.is_grad_enabled():
            # Not in the gradient-free first pass of recompute, or all would be counted twice.
            probs_TK = self.losses.attach(
                probs_TK, logits_TE, indices_TK, valid_T, input.shape[1], self._layer_place()
            )
            self._count(indices_TK, valid_T)
        return self._limit(probs_TK, indices_TK, valid_T)

    def gating(self, input: Tensor) -> Tensor:
        """Logits ``(S, B, E)`` in the router's dtype."""
        dtype = torch.promote_types(_ROUTER_DTYPES[self.config.moe_router_dtype], input.dtype)
        if input.numel() == 0:  # Megatron's function cannot shape the result of no tokens
            bias = None if self.bias is None else self.bias.to(dtype)
            return torch.nn.functional.linear(input.to(dtype), self.weight.to(dtype), bias)
        return router_gating_linear(input, self.weight, self.bias, dtype)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Decide from logits alone: no losses, no counts."""
        valid_T = None if padding_mask is None else ~padding_mask.flatten()
        return self._limit(*self._choose(logits.reshape(-1, self.num_experts)), valid_T)

    def reset_global_aux_loss_tracker(self) -> None:
        """Forget the counts of the global batch; Megatron calls this after each one."""
        self.losses.reset_global_counts()

    def _choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        return choose(
            logits_TE,
            self.topk,
            score_function=c.moe_router_score_function,
            pre_softmax=c.moe_router_pre_softmax,
            num_groups=c.moe_router_num_groups,
            group_topk=c.moe_router_group_topk,
            scaling_factor=c.moe_router_topk_scaling_factor,
            expert_bias_E=self.expert_bias,
        )

    def _limit(self, probs_TK: Tensor, indices_TK: Tensor, valid_T: Tensor | None) -> Routing:
        c = self.config
        num_tokens = indices_TK.shape[0]
        kept_TK = None if valid_T is None else valid_T.unsqueeze(1).expand_as(indices_TK)
        capacity = None
        if c.moe_expert_capacity_factor is not None:
            capacity = capacity_of(
                num_tokens, self.topk, self.num_experts, c.moe_expert_capacity_factor
            )
            kept_TK = within_capacity(
                probs_TK, indices_TK, self.num_experts, capacity, c.moe_token_drop_policy, kept_TK
            )
        padded = capacity if c.moe_pad_expert_input_to_capacity else None
        return Routing(indices_TK, probs_TK, self.num_experts, kept_TK, padded)

    def _count(self, indices_TK: Tensor, valid_T: Tensor | None) -> None:
        valid_TK = None if valid_T is None else valid_T.unsqueeze(1).expand_as(indices_TK)
        counts_E = count_choices(indices_TK, self.num_experts, valid_TK)
        self.load = self.load.to(counts_E.device) + counts_E
        if self.local_tokens_per_expert is not None:
            self.local_tokens_per_expert += counts_E

    def _jitter(self, input: Tensor) -> Tensor:
        eps = self.config.moe_input_jitter_eps
        if eps is None:
            return input
        return input * torch.empty_like(input).uniform_(1.0 - eps, 1.0 + eps)

    def _layer_place(self) -> int | None:
        """1-based place of this layer in Megatron's metric vectors: decoder layers, then MTP."""
        if self.layer_number is None or not self.is_mtp_layer:
            return self.layer_number
        return self.layer_number + self.config.num_layers

    def _apply(self, fn: Any, recurse: bool = True) -> TopKRouter:
        """Move the bias with the module, but never round it to a half-precision model's dtype."""
        exact_E = self.expert_bias
        super()._apply(fn, recurse)
        if exact_E is not None and self.expert_bias is not None:
            self.expert_bias = exact_E.to(self.expert_bias.device)
        return self

    def _maintain_float32_expert_bias(self) -> None:
        """Megatron asks for this after casting a model; ``_apply`` has kept the bias exact."""
