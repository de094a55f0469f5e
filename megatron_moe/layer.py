"""The MoE layer: route → dispatch → experts → combine, wired together, nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoELayer
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_moe import config as options
from megatron_moe.dispatch.dispatcher import DISPATCHERS, Dispatcher
from megatron_moe.experts.sparse import follow
from megatron_moe.experts.weights import first_weights
from megatron_moe.mcore import finish
from megatron_moe.mcore.recompute import recomputed
from megatron_moe.parallel.groups import ExpertGroups
from megatron_moe.route.decision import Routing
from megatron_moe.route.options import warn_if_unbalanced


class MoELayer(MegatronMoELayer):
    """Mixture of experts in the place of a transformer layer's MLP.

    A subclass of Megatron's layer because recompute, packed sequences and inference ask for one;
    router, dispatcher and experts are ours. The four stages of :meth:`forward` hand everything on
    as values: nothing of a step stays on the layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        moe: options.MoEConfig | None = None,
    ) -> None:
        moe = moe or options.MoEConfig()
        options.check(config, moe)
        warn_if_unbalanced(config, moe)
        pg_collection = pg_collection or get_default_pg_collection()
        groups = ExpertGroups.from_collection(pg_collection)
        groups.check(config.num_moe_experts)
        groups.bring_up()
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        self.groups = groups
        self.recompute_experts = moe.recompute_experts
        self.token_dispatcher: Dispatcher = DISPATCHERS[config.moe_token_dispatcher_type](
            config.num_moe_experts, groups
        )
        finish.install(config)
        follow(self.experts, self.router.schedule)
        self.router.expert_offload = getattr(self.experts, "offload", None)
        if self.router.distillation is not None:
            self.router.distillation.first_weights = partial(first_weights, self.experts)

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Route, dispatch, compute, combine.

        Args:
            hidden_states: ``(S, B, D)``, this rank's slice of the sequence.
            intermediate_tensors: Megatron's hand-over between CUDA graphs; must be None.
            padding_mask: True for padding, ``(B, S)``: such tokens go to no expert.

        Returns:
            ``(S, B, D)`` and no bias: experts add theirs.

        Cost: with EP, two all-to-alls (and two in backward) and one all-gather of counts.
        """
        assert intermediate_tensors is None, "CUDA graphs of MoE parts are refused at build"
        mask_SB = None if padding_mask is None else padding_mask.transpose(0, 1).bool()
        routing = self.router(hidden_states, mask_SB)
        if self.moe_layer_recompute and self.training:
            # The decision stands outside: what is computed again cannot decide anew.
            compute = partial(self._compute, routing)
            inputs = hidden_states, routing.probs_TK
            output = recomputed(self.config, self.tp_group, compute, *inputs)
        else:
            output = self._compute(routing, hidden_states, routing.probs_TK)
        return output, None

    def _compute(self, routing: Routing, hidden_states: Tensor, probs_TK: Tensor) -> Tensor:
        """Everything after the decision; the weights come apart from it to carry a gradient."""
        routing = replace(routing, probs_TK=probs_TK)
        shared = self.shared_experts_compute(hidden_states)
        rows, probs, plan = self.token_dispatcher.dispatch(hidden_states.flatten(0, 1), routing)
        results = self._expert_results(rows, plan.tokens_per_expert, probs)
        output = self.token_dispatcher.combine(results, plan).view_as(hidden_states)
        return output if shared is None else output + shared

    def _expert_results(self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> Tensor:
        def compute(rows: Tensor, probs: Tensor) -> Tensor:
            return self.experts(rows, tokens_per_expert, probs)[0]

        if self.recompute_experts and self.training:
            return recomputed(self.config, self.tp_group, compute, rows, probs)
        return compute(rows, probs)

    def route(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The decision in Megatron's form: ``probs`` ``(T, E)``, ``routing_map`` ``(T, E)``."""
        return self.router(hidden_states, padding_mask).dense()
