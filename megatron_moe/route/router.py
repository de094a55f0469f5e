"""The router that Megatron sees: gate, decision, losses, counts."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import apply_random_logits, router_gating_linear
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_moe.buffers import ExactBuffers
from megatron_moe.config import MoEConfig
from megatron_moe.parallel.groups import ExpertGroups
from megatron_moe.route.bias import ExpertBias
from megatron_moe.route.capacity import Capacity
from megatron_moe.route.choice import choice_named, name_of_choice
from megatron_moe.route.choices.adaptive import Adaptive
from megatron_moe.route.decision import Picked, Routing
from megatron_moe.route.distil import distillation_of
from megatron_moe.route.hysteresis import hysteresis_of
from megatron_moe.route.losses import RouterLosses
from megatron_moe.route.memory import Decision, DecisionMemory
from megatron_moe.route.part import RouterPart
from megatron_moe.route.probe import probe_of
from megatron_moe.route.replay import replay_of
from megatron_moe.route.schedule import Schedule
from megatron_moe.route.tokens import Tokens
from megatron_moe.telemetry.tally import Tally
from megatron_moe.telemetry.tracker import (
    CACHE_HITS,
    CHURN,
    CONTEXT_CHURN,
    DROP_RATE,
    MEAN_K,
    record,
)

# State under these keys must be in a checkpoint; any other of a router's is ours alone.
MEGATRON_BUFFERS = ("expert_bias", "qb_beta", "local_tokens_per_expert")
_log = logging.getLogger(__name__)
_ROUTER_DTYPES = {None: torch.float32, "fp32": torch.float32, "fp64": torch.float64}


class TopKRouter(ExactBuffers, Router):
    """Give each token its experts, by the choice that the options name.

    Parameter and buffer names are Megatron's (``weight``, ``bias``, ``expert_bias``). The gate is
    computed in fp32 unless ``moe_router_dtype`` says fp64: half-precision logits flip near-ties.
    Everything with state is a :class:`RouterPart`; its buffers are the router's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        moe: MoEConfig | None = None,
    ) -> None:
        super().__init__(config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        moe = moe or MoEConfig()
        self.topk = config.moe_router_topk
        self.groups = ExpertGroups.from_collection(pg_collection)
        self.choice = choice_named(name_of_choice(config, moe))(config, moe, self.groups)
        self.schedule = Schedule(config, moe)
        self.capacity = Capacity.from_options(config, moe)
        limited, adaptive = self.capacity.factor is not None, isinstance(self.choice, Adaptive)
        self.tally = Tally(self.num_experts, reports=limited or adaptive)
        self.balancing_bias: ExpertBias | None = None
        if config.moe_router_enable_expert_bias:
            self.balancing_bias = ExpertBias(config, moe)
        self.hysteresis = hysteresis_of(self.choice, moe, self.groups)
        self.probe = probe_of(self.choice, config, moe, self._decide_anew)
        self.distillation = distillation_of(config, moe, self.schedule, self.groups)
        self.replay = replay_of(moe, self.schedule)
        asked_for: tuple[RouterPart | None, ...] = (
            self.choice,
            self.replay,  # before the schedule, by whose count it writes
            self.schedule,
            self.tally,
            self.balancing_bias,
            self.hysteresis,
            self.probe,
            self.distillation,
        )
        self.parts = [part for part in asked_for if part is not None]
        self.router_replay = RouterReplay() if config.moe_enable_routing_replay else None
        self.needs_token_ids = any(part.needs_token_ids for part in self.parts)
        self.needs_contexts = any(part.needs_contexts for part in self.parts)
        self.context_length = moe.context_length
        self._token_ids_BS: Tensor | None = None
        self._contexts_BS: Tensor | None = None
        self._register_buffers()
        self.losses = RouterLosses(config, moe, self.groups)
        self.memory = DecisionMemory()
        # Put here by the layer: its experts' cache, which has figures to report but no router.
        self.expert_offload: Any = None

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Decide.

        Args:
            input: Hidden states, ``(S, B, D)``.
            padding_mask: True for padding, ``(S, B)``; such tokens go to no expert and are in no
                count, capacity or loss.

        Returns:
            The decision for the S · B tokens in sequence-major order.
        """
        logits_SBE = self._logits(input)
        # Not in the gradient-free first pass of recompute, or all would be counted twice.
        counted = self.training and torch.is_grad_enabled()
        first_pass = self.training and not counted and self.config.recompute_granularity == "full"
        valid_T = None if padding_mask is None else ~padding_mask.flatten()
        tokens = self._tokens(logits_SBE, valid_T, training=counted or first_pass, input=input)
        decision, probs_TK = self._decide(tokens, recall=counted)
        if first_pass:
            self.memory.keep(tokens.logits_TE, decision)
        if counted:
            probs_TK = self._learn(tokens, decision, probs_TK)
        return self._routing(decision, probs_TK)

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron says which layer this is, 1-based."""
        super().set_layer_number(layer_number)
        if self.replay is not None:
            self.replay.layer = self.layer_place

    def gating(self, input: Tensor) -> Tensor:
        """Logits ``(S, B, E)`` in the router's dtype."""
        dtype = torch.promote_types(_ROUTER_DTYPES[self.config.moe_router_dtype], input.dtype)
        if input.numel() == 0:  # Megatron's function cannot shape the result of no tokens
            bias = None if self.bias is None else self.bias.to(dtype)
            return torch.nn.functional.linear(input.to(dtype), self.weight.to(dtype), bias)
        return router_gating_linear(input, self.weight, self.bias, dtype)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Decide from logits ``(S, B, E)`` or ``(T, E)`` alone: no losses, no counts."""
        valid_T = None if padding_mask is None else ~padding_mask.flatten()
        logits_SBE = logits if logits.dim() == 3 else logits.unsqueeze(1)
        tokens = self._tokens(logits_SBE, valid_T, training=False)
        return self._routing(*self._decide(tokens, recall=False))

    def reset_global_aux_loss_tracker(self) -> None:
        """Forget the counts of the global batch; Megatron calls this after each one."""
        self.losses.reset_global()

    def end_batch(self) -> None:
        """What is left to do after a global batch when the parts have updated their state."""
        self.losses.reset_global()
        self.memory.clear()
        # Megatron reports means over micro-batches, and these belong to all of them.
        micro_batches, self.tally.micro_batches = self.tally.micro_batches, 0
        figures = {
            DROP_RATE: None if self.capacity.factor is None else self.tally.drop_rate,
            MEAN_K: self.tally.mean_k if isinstance(self.choice, Adaptive) else None,
            CHURN: self.churn,
            CONTEXT_CHURN: None if self.hysteresis is None else self.hysteresis.repeat_churn,
            CACHE_HITS: None if self.expert_offload is None else self.expert_offload.hit_rate,
        }
        for name, value in figures.items():
            if value is not None:
                record(self, name, value * micro_batches)

    @property
    def frozen_expert_bias(self) -> bool:
        """Megatron asks this when it finalises gradients: its own update of the bias is off.

        Raises:
            RuntimeError: The plugin's end of the global batch was taken out, and nothing else
                would update the bias, without a word.
        """
        if self.tally.micro_batches:
            raise RuntimeError(
                "config.finalize_model_grads_func was replaced after the model was built, so no "
                "router ends its global batch: wrap what is there, or call "
                "megatron_moe.mcore.finish.install(config) again"
            )
        return True

    @property
    def churn(self) -> float | None:
        """Share of the probe's choices that changed in the last global batch; None without one."""
        return None if self.probe is None else self.probe.churn()

    def _logits(self, input: Tensor) -> Tensor:
        noisy = self.training
        logits_SBE = self.gating(self.schedule.jittered(input) if noisy else input)
        if self.config.moe_router_force_load_balancing:
            logits_SBE = apply_random_logits(logits_SBE)
        return self.schedule.noisy(logits_SBE) if noisy else logits_SBE

    def note_token_ids(self, ids_BS: Tensor, contexts_BS: Tensor | None) -> None:
        """Take the vocabulary ids of the next micro-batch, and hashes of their contexts."""
        self._token_ids_BS, self._contexts_BS = ids_BS, contexts_BS

    def _tokens(
        self,
        logits_SBE: Tensor,
        valid_T: Tensor | None,
        *,
        training: bool,
        input: Tensor | None = None,
    ) -> Tokens:
        return Tokens(
            logits_TE=logits_SBE.flatten(0, 1),
            valid_T=valid_T,
            num_sequences=logits_SBE.shape[1],
            training=training,
            # Logits given by themselves belong to no text.
            token_ids_T=self._mine(self._token_ids_BS, input, self.needs_token_ids),
            contexts_T=self._mine(self._contexts_BS, input, self.needs_contexts),
            inputs_TD=None if input is None else input.flatten(0, 1),
        )

    def _mine(self, ids_BS: Tensor | None, input: Tensor | None, needed: bool) -> Tensor | None:
        """This rank's slice of the ids, in the order of the hidden states."""
        if input is None or not needed:
            return None
        if ids_BS is None:
            raise ValueError(
                "router_choice hash and hysteresis_margin need the token ids of the model: build "
                "it by the plugin's builder (megatron-moe run), or call "
                "megatron_moe.mcore.token_ids.feed_token_ids(model) once"
            )
        ids_SB = ids_BS.t()
        length = input.shape[0]
        first = self.tp_group.rank() * length if self.config.sequence_parallel else 0
        return ids_SB[first : first + length].flatten()

    def _decide(self, tokens: Tokens, *, recall: bool) -> tuple[Decision, Tensor]:
        """The decision and its weights ``(T, K)``; one that a first pass left, if ``recall``."""
        decision = self.memory.take(tokens.logits_TE) if recall else None
        picked = decision.picked if decision else self._pick(tokens)
        probs_TK = self.choice.weigh(tokens.logits_TE, picked)
        return decision or self._limit(probs_TK, picked), probs_TK

    def _routing(self, decision: Decision, probs_TK: Tensor) -> Routing:
        indices_TK = decision.picked.indices_TK
        return Routing(indices_TK, probs_TK, self.num_experts, decision.kept_TK, decision.capacity)

    def _decide_anew(self, inputs_MD: Tensor) -> Picked:
        """Choose for inputs by themselves, as in evaluation."""
        tokens = self._tokens(self.gating(inputs_MD.unsqueeze(1)), None, training=False)
        return self._pick(tokens)

    @torch.no_grad()
    def _pick(self, tokens: Tokens) -> Picked:
        if self.replay is not None and tokens.training:
            return self.replay.decide(partial(self._pick_anew, tokens), tokens)
        return self._pick_anew(tokens)

    def _pick_anew(self, tokens: Tokens) -> Picked:
        biases = [b for part in self.parts if (b := part.ranking_bias(tokens)) is not None]
        if biases:
            tokens = tokens.ranked_with(sum(biases[1:], start=biases[0]))
        if self.router_replay is None:
            return self.choice.pick(tokens).without_padding(tokens.valid_T)
        # Megatron's own replay, for programs that steer it from outside.
        _, indices_TK = self.router_replay.get_replay_topk(
            tokens.logits_TE,
            self.topk,
            default_compute_topk=lambda *_args, **_kwargs: (
                None,
                self.choice.pick(tokens).indices_TK,
            ),
        )
        return Picked(indices_TK.to(tokens.logits_TE.device)).without_padding(tokens.valid_T)

    @torch.no_grad()
    def _limit(self, probs_TK: Tensor, picked: Picked) -> Decision:
        kept_TK, rows = self.capacity.limit(
            probs_TK, picked, self.num_experts, self.choice.mean_k, self.groups, self.training
        )
        return Decision(picked, kept_TK, rows)

    def _learn(self, tokens: Tokens, decision: Decision, probs_TK: Tensor) -> Tensor:
        """Attach the losses and count, once for each micro-batch of training."""
        if self.schedule.gate_only:
            probs_TK = probs_TK.detach()  # the router learns from its own losses alone
        picked = decision.picked
        own = [loss for part in self.parts for loss in part.losses(tokens, picked)]
        probs_TK = self.losses.attach(
            probs_TK,
            tokens.logits_TE,
            picked,
            tokens.valid_T,
            tokens.num_sequences,
            self.layer_place,
            own,
        )
        with torch.no_grad():
            for part in self.parts:
                part.observe(tokens, picked)
            self.tally.add(tokens, picked, decision.kept_TK)
        return probs_TK

    @property
    def layer_place(self) -> int | None:
        """1-based place of this layer in Megatron's metric vectors: decoder layers, then MTP."""
        if self.layer_number is None or not self.is_mtp_layer:
            return self.layer_number
        return self.layer_number + self.config.num_layers

    def _register_buffers(self) -> None:
        """Make the parts' state buffers of this module, so that it moves and is saved with it."""
        device = self.weight.device
        for part in self.parts:
            for name, value in part.buffers().items():
                self.register_buffer(name, value.to(device))
            part.state = self._buffers
        counts_E = None
        if self.balancing_bias is not None:
            # int64: half-precision (or large fp32) counts would round and flip the bias update.
            counts_E = torch.zeros(self.num_experts, dtype=torch.int64, device=device)
        else:
            self.register_buffer("expert_bias", None)
        self.register_buffer("local_tokens_per_expert", counts_E, persistent=False)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load, strictly but for state that is ours alone.

        What the checkpoint has not stays as it is, what only it has is left, with a warning.
        """
        for name, buffer in self._buffers.items():
            if buffer is not None and name not in MEGATRON_BUFFERS:
                state_dict.setdefault(prefix + name, buffer)
        known = {*self._parameters, *self._buffers, *MEGATRON_BUFFERS}
        for key in [k for k in state_dict if k.startswith(prefix)]:
            if key.removeprefix(prefix) not in known:
                _log.warning("%s in the checkpoint belongs to an option that is off: left", key)
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.schedule.loaded()

    def _maintain_float32_expert_bias(self) -> None:
        """Megatron asks for this after casting a model; ``_apply`` has kept the bias exact."""
