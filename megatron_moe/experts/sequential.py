"""One expert after another: the reference, with Megatron's own linear layers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe.experts.initialise import draw_seed, initialise_experts
from megatron_moe.experts.keys import accept_grouped_keys


class SequentialExperts(SequentialMLP):
    """Megatron's SequentialMLP, with layout-independent initial weights on the CPU.

    Loads checkpoints with grouped keys (``linear_fc1.weight0``) as well as its own
    (``local_experts.0.linear_fc1.weight``).
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: Any,
        pg_collection: Any = None,
        name: str | None = None,
    ) -> None:
        seed = draw_seed()
        with torch.random.fork_rng(devices=[], enabled=config.use_cpu_initialization):
            super().__init__(num_local_experts, config, submodules, pg_collection, name)
        if config.use_cpu_initialization and config.perform_initialization:
            weights = [
                (e.linear_fc1.weight.data, e.linear_fc2.weight.data) for e in self.local_experts
            ]
            initialise_experts(weights, config, self.ep_group, self.tp_group, seed)
        for expert in self.local_experts:
            # The dispatcher communicates, not the linear layer. Megatron knows this only for
            # EP or ETP > 1; with one rank its no-op reduction returns a view to which the MLP
            # then adds the bias in place, which autograd forbids.
            expert.linear_fc2.explicit_expert_comm = True
            if expert.linear_fc2.bias is not None:
                # Marked by Megatron as if tokens were spread over TP here: its gradient, complete
                # on the expert's owner, would be summed over TP, with other experts' mixed in.
                expert.linear_fc2.bias.sequence_parallel = False
        self.register_load_state_dict_pre_hook(accept_grouped_keys)
