"""All experts of a rank in two stacked weights, multiplied by grouped GEMMs."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor

from megatron_moe.experts.activation import weighted_activation
from megatron_moe.experts.grouped_gemm import choose_form, grouped_linear
from megatron_moe.experts.initialise import draw_seed, initialise_expert
from megatron_moe.experts.keys import accept_sequential_keys
from megatron_moe.experts.sharding import ExpertShard, empty_extra_states, sharded_stack
from megatron_moe.parallel.groups import ExpertGroups, is_ordinary_expert

# Axis of one expert's tensor that is cut over ETP; every ETP rank holds all of the others.
_SHARDED_AXIS = {"linear_fc1.weight": 0, "linear_fc1.bias": 0, "linear_fc2.weight": 1}


class StackedLinear(torch.nn.Module):
    """One linear layer of e experts: ``weight`` ``(e, out, in)`` and ``bias`` ``(e, out)``.

    In a plain state dict each expert has its own key (``weight0``, ``weight1``, …), the names of
    Transformer Engine's grouped linear, so that checkpoints go both ways.
    """

    def __init__(
        self,
        num_local_experts: int,
        shape: tuple[int, int],
        config: TransformerConfig,
        *,
        bias: bool,
        shard_dim: int,
        ordinary: bool,
    ) -> None:
        super().__init__()
        device = torch.device("cpu" if config.use_cpu_initialization else "cuda")
        kwargs = {"device": device, "dtype": config.params_dtype}
        self.weight = torch.nn.Parameter(torch.empty(num_local_experts, *shape, **kwargs))
        self.bias: torch.nn.Parameter | None = None
        stride = 2 if config.gated_linear_unit and shard_dim == 0 else 1
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(num_local_experts, shape[0], **kwargs))
        for name, parameter in self.named_parameters():
            sharded = shard_dim == 0 or name == "weight"
            dim = 1 + shard_dim if sharded else -1
            set_tensor_model_parallel_attributes(parameter, sharded, dim, stride)
            parameter.allreduce = ordinary  # type: ignore[attr-defined]  # Megatron's mark

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        for name, parameter in self.named_parameters():
            for i, one in enumerate(parameter.unbind(0)):
                destination[f"{prefix}{name}{i}"] = one if keep_vars else one.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        expected: set[str] = set()
        for name, parameter in self.named_parameters():
            targets = {f"{prefix}{name}{i}": one for i, one in enumerate(parameter.data.unbind(0))}
            if f"{prefix}{name}" in state_dict:  # a distributed checkpoint: stacked already
                targets = {f"{prefix}{name}": parameter.data}
            expected |= targets.keys()
            for key, target in targets.items():
                found = state_dict.get(key)
                if found is None:
                    missing_keys.append(key)
                elif found.shape != target.shape:
                    error_msgs.append(
                        f"size mismatch for {key}: {tuple(found.shape)} in the checkpoint, "
                        f"{tuple(target.shape)} in the model"
                    )
                else:
                    target.copy_(found)
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in expected]


class GroupedExperts(MegatronModule):
    """The experts of this rank, computed together; no Transformer Engine needed.

    Args:
        num_local_experts: e.
        config: Megatron's; ``moe_ffn_hidden_size``, gating, activation, bias and ETP are read.
        pg_collection: Process groups.
        name: Unused; Megatron passes it.
        gemm: ``auto``, ``grouped_mm`` or ``loop``.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: Any = None,
        name: str | None = None,
        gemm: str = "auto",
    ) -> None:
        config = copy(config)
        config.ffn_hidden_size = config.moe_ffn_hidden_size or config.ffn_hidden_size
        super().__init__(config=config)
        groups = ExpertGroups.from_collection(pg_collection)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = groups.ep, groups.etp, groups.edp
        self.gemm = gemm
        ffn, rest = divmod(config.ffn_hidden_size, groups.etp.size())
        if rest:
            raise ValueError(
                f"moe_ffn_hidden_size ({config.ffn_hidden_size}) must be a multiple of "
                f"expert_tensor_parallel_size ({groups.etp.size()})"
            )
        ordinary = is_ordinary_expert(
            config.tensor_model_parallel_size, groups.etp.size(), groups.ep.size()
        )
        hidden, halves = config.hidden_size, 2 if config.gated_linear_unit else 1
        linear = {"config": config, "bias": config.add_bias_linear, "ordinary": ordinary}
        e = num_local_experts
        self.linear_fc1 = StackedLinear(e, (halves * ffn, hidden), shard_dim=0, **linear)
        self.linear_fc2 = StackedLinear(e, (hidden, ffn), shard_dim=1, **linear)
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

        Cost: two grouped GEMMs; keeps the input, the first layer's output and the activation.
        """
        c = self.config
        rows_e = tokens_per_expert.tolist()
        form = choose_form(self.gemm, tokens.device, tokens.dtype)
        weights: Tensor | None = probs
        if c.moe_apply_probs_on_input:
            tokens = (tokens * probs.unsqueeze(-1)).to(tokens.dtype)
            weights = None
        hidden = grouped_linear(tokens, self.linear_fc1.weight, rows_e, form)
        if self.linear_fc1.bias is not None:
            hidden = hidden + _of_each_row(self.linear_fc1.bias, rows_e)
        hidden = weighted_activation(
            hidden,
            weights,
            c.activation_func,
            gated=c.gated_linear_unit,
            linear_offset=c.glu_linear_offset,
            clamp=c.activation_func_clamp_value,
        )
        out = grouped_linear(hidden, self.linear_fc2.weight, rows_e, form)
        if self.linear_fc2.bias is not None:
            bias = _of_each_row(self.linear_fc2.bias, rows_e)
            out = out + (bias if weights is None else bias * probs.unsqueeze(-1)).to(out.dtype)
        return out, None

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
            for name, parameter in linear.named_parameters():
                out |= sharded_stack(
                    parameter,
                    prefix,
                    f"{layer}.{name}",
                    shard,
                    sharded_offsets,
                    gated=self.config.gated_linear_unit and layer == "linear_fc1",
                    sharded_axis=_SHARDED_AXIS.get(f"{layer}.{name}"),
                    singleton=singleton,
                )
            if not singleton:
                out |= empty_extra_states(prefix, layer, shard, sharded_offsets)
        return out

    def _initialise(self) -> None:
        c, fc1, fc2 = self.config, self.linear_fc1.weight.data, self.linear_fc2.weight.data
        if not c.use_cpu_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                for i in range(self.num_local_experts):
                    c.init_method(fc1[i])
                    c.output_layer_init_method(fc2[i])
            return
        seed = draw_seed()
        first = self.ep_group.rank() * self.num_local_experts
        shard = {"shard_rank": self.tp_group.rank(), "num_shards": self.tp_group.size()}
        for i in range(self.num_local_experts):
            halves = fc1[i].chunk(2) if c.gated_linear_unit else (fc1[i],)
            at = seed + 2 * (first + i)
            initialise_expert(halves, c.init_method, at, shard_dim=0, **shard)
            initialise_expert((fc2[i],), c.output_layer_init_method, at + 1, shard_dim=1, **shard)


def _of_each_row(bias_eF: Tensor, rows_e: list[int]) -> Tensor:
    rows = torch.tensor(rows_e, device=bias_eF.device)
    return bias_eF.repeat_interleave(rows, dim=0, output_size=sum(rows_e))
