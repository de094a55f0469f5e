"""All experts of a rank in two stacked weights, multiplied by grouped GEMMs."""

from __future__ import annotations

from copy import copy
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor

from megatron_moe.config import MoEConfig
from megatron_moe.experts.activation import weighted_activation
from megatron_moe.experts.fp8_delayed import DelayedScales
from megatron_moe.experts.initialise import draw_seed, initialise_experts
from megatron_moe.experts.keys import accept_sequential_keys
from megatron_moe.experts.sharding import ExpertShard, empty_extra_states, sharded_stack
from megatron_moe.experts.stacked import StackedLinear
from megatron_moe.parallel.groups import ExpertGroups, is_ordinary_expert

# Axis of one expert's tensor that is cut over ETP; every ETP rank holds all of the others.
_SHARDED_AXIS = {
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_fc1.mask": 0,
    "linear_fc2.weight": 1,
    "linear_fc2.mask": 1,
}


class GroupedExperts(MegatronModule):
    """The experts of this rank, computed together; no Transformer Engine needed.

    Args:
        num_local_experts: e.
        config: Megatron's; ``moe_ffn_hidden_size``, gating, activation, bias and ETP are read.
        pg_collection: Process groups.
        name: Unused; Megatron passes it.
        moe: The plugin's options; the defaults when None.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: Any = None,
        name: str | None = None,
        moe: MoEConfig | None = None,
    ) -> None:
        moe = moe or MoEConfig()
        config = copy(config)
        config.ffn_hidden_size = config.moe_ffn_hidden_size or config.ffn_hidden_size
        super().__init__(config=config)
        groups = ExpertGroups.from_collection(pg_collection)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = groups.ep, groups.etp, groups.edp
        ffn, rest = divmod(config.ffn_hidden_size, groups.etp.size())
        if rest:
            raise ValueError(
                f"moe_ffn_hidden_size ({config.ffn_hidden_size}) must be a multiple of "
                f"expert_tensor_parallel_size ({groups.etp.size()})"
            )
        ordinary = is_ordinary_expert(
            config.tensor_model_parallel_size, groups.etp.size(), groups.ep.size()
        )
        self.recompute_activation = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )
        hidden, halves = config.hidden_size, 2 if config.gated_linear_unit else 1
        e, linear = num_local_experts, {"config": config, "moe": moe, "ordinary": ordinary}
        self.linear_fc1 = StackedLinear(e, (halves * ffn, hidden), shard_dim=0, **linear)
        self.linear_fc2 = StackedLinear(e, (hidden, ffn), shard_dim=1, **linear)
        self.offload = self.linear_fc1.offload
        if self.offload is not None:
            self.offload.add_layer(self.linear_fc1, self.linear_fc2)
        if config.perform_initialization:
            self._initialise()
        self.register_load_state_dict_pre_hook(accept_sequential_keys)

    def forward(
        self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, None]:
        """Compute all experts.

        Args:
            tokens: Rows by expert, ``(R, D)``; R may be 0.
            tokens_per_expert: ``(e,)`` integers on the host.
            probs: Weight of each row, ``(R,)``.

        Returns:
            Weighted results, ``(R, D)`` (a summand with ETP), and no bias: it is added here.

        Cost: two grouped GEMMs; keeps the input, the first layer's output and, unless
            ``recompute_modules`` has ``moe_act``, the activation.
        """
        c = self.config
        rows_e = tokens_per_expert.tolist()
        weights: Tensor | None = probs
        if c.moe_apply_probs_on_input:
            tokens = (tokens * probs.unsqueeze(-1)).to(tokens.dtype)
            weights = None
        hidden = self.linear_fc1(tokens, rows_e)
        between = (hidden, weights, self.linear_fc1.bias_of_rows(rows_e))
        if self.recompute_activation and self.training:
            out = self.linear_fc2(between, rows_e, before=self._activate)
        else:
            out = self.linear_fc2(self._activate(*between), rows_e)
        if (bias := self.linear_fc2.bias_of_rows(rows_e)) is not None:
            out = out + (bias if weights is None else bias * probs.unsqueeze(-1)).to(out.dtype)
        return out, None

    def _activate(self, hidden: Tensor, probs: Tensor | None, bias: Tensor | None) -> Tensor:
        c = self.config
        return weighted_activation(
            hidden if bias is None else hidden + bias,
            probs,
            c.activation_func,
            gated=c.gated_linear_unit,
            linear_offset=c.glu_linear_offset,
            clamp=c.activation_func_clamp_value,
        )

    def delayed_scales(self) -> list[DelayedScales]:
        """The state of emulated delayed scaling, in a fixed order; mostly none."""
        found = (self.linear_fc1.fp8_scales, self.linear_fc2.fp8_scales)
        return [scales for scales in found if scales is not None]

    def backward_dw(self) -> None:
        """Nothing is delayed; Megatron calls this where weight gradients may be."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Megatron's sharded form: the keys and global shapes of its sequential experts."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        shard = ExpertShard(self.ep_group, self.tp_group, self.dp_group, self.num_local_experts)
        out: ShardedStateDict = {}
        singleton = metadata.get("singleton_local_shards", False)
        for layer, linear in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2)):
            for name, stack in (*linear.named_parameters(), *linear.saved_state().items()):
                out |= sharded_stack(
                    stack,
                    prefix,
                    f"{layer}.{name}",
                    shard,
                    sharded_offsets,
                    gated=self.config.gated_linear_unit
                    and layer == "linear_fc1"
                    and not name.startswith("fp8"),
                    sharded_axis=_SHARDED_AXIS.get(f"{layer}.{name}"),
                    singleton=singleton,
                )
            if not singleton:
                out |= empty_extra_states(prefix, layer, shard, sharded_offsets)
        return out

    def _initialise(self) -> None:
        c, fc1, fc2 = self.config, self.linear_fc1.weight.data, self.linear_fc2.weight.data
        if c.use_cpu_initialization:
            weights = zip(fc1.unbind(0), fc2.unbind(0), strict=True)
            initialise_experts(weights, c, self.ep_group, self.tp_group, draw_seed())
            return
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            for i in range(self.num_local_experts):
                c.init_method(fc1[i])
                c.output_layer_init_method(fc2[i])
