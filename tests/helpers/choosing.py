"""Choices of experts alone, without router or Megatron: the options they read, and their pieces."""

from types import SimpleNamespace
from typing import Any

import torch
from helpers.alone import alone
from torch import Tensor

from megatron_moe.config import MoEConfig
from megatron_moe.route.choice import Choice, choice_named
from megatron_moe.route.decision import Picked
from megatron_moe.route.tokens import Tokens

_FIELDS: dict[str, Any] = {
    "num_layers": 2,
    "mtp_num_layers": None,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_bias_update_rate": 0.001,
    "moe_router_quantile_balancing_ema": 0.0,
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": None,
    "moe_input_jitter_eps": None,
    "moe_expert_capacity_factor": None,
    "moe_pad_expert_input_to_capacity": False,
    "moe_token_drop_policy": "probs",
    "moe_router_force_load_balancing": False,
    "recompute_granularity": None,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
}

# Every choice, with options under which it works for any E of at least 2.
ANY_CHOICE: dict[str, tuple[MoEConfig, dict[str, Any]]] = {
    "topk": (MoEConfig(), {}),
    "switch": (MoEConfig(), {"moe_router_topk": 1}),
    "gshard": (MoEConfig(), {"moe_router_topk": 2}),
    "gshard-random": (MoEConfig(second_expert="random"), {"moe_router_topk": 2}),
    "expert_choice": (MoEConfig(allow_future_tokens=True), {}),
    "expert_choice-sequence": (
        MoEConfig(allow_future_tokens=True, expert_choice_scope="sequence"),
        {},
    ),
    "sinkhorn": (MoEConfig(), {}),
    "quantile": (MoEConfig(), {}),
    "hash": (MoEConfig(), {}),
    "top_p": (MoEConfig(), {}),
    "threshold": (MoEConfig(), {}),
}


def options(**changes: Any) -> SimpleNamespace:
    """Return what routing reads of a ``TransformerConfig``."""
    unknown = changes.keys() - _FIELDS.keys()
    assert not unknown, unknown
    return SimpleNamespace(**(_FIELDS | changes))


def build(name: str, moe: MoEConfig | None = None, **changes: Any) -> Choice:
    """Return a choice on one rank, with state; what follows a dash in the name does not count."""
    choice = choice_named(name.partition("-")[0])(options(**changes), moe or MoEConfig(), alone())
    choice.state = choice.buffers()
    return choice


def build_any(name: str, **changes: Any) -> Choice:
    """Return a choice of ``ANY_CHOICE``; with one expert, K is 1 too."""
    moe, fields = ANY_CHOICE[name]
    fields = fields | changes
    if fields.get("num_moe_experts") == 1:
        fields["moe_router_topk"] = 1
    return build(name, moe, **fields)


def tokens_of(logits: Tensor, **more: Any) -> Tokens:
    """Return the tokens of logits ``(T, E)``; vocabulary ids count up if none are given."""
    ids = more.pop("token_ids_T", torch.arange(logits.shape[0]))
    return Tokens(logits_TE=logits, token_ids_T=ids, **more)


def pick(choice: Choice, tokens: Tokens) -> Picked:
    """Let a choice decide as the router does."""
    with torch.no_grad():
        return choice.pick(tokens).without_padding(tokens.valid_T)


def experts_of(picked: Picked) -> list[set[int]]:
    """Return the experts of each token."""
    rows = zip(picked.indices_TK.tolist(), picked.mask().tolist(), strict=True)
    return [{e for e, c in zip(*row, strict=True) if c} for row in rows]


def weights_of(choice: Choice, logits: Tensor, picked: Picked) -> list[dict[int, float]]:
    """Return the weight of each choice made, by token and expert."""
    probs = choice.weigh(logits, picked).tolist()
    rows = zip(picked.indices_TK.tolist(), picked.mask().tolist(), probs, strict=True)
    return [{e: p for e, c, p in zip(*row, strict=True) if c} for row in rows]


def random_logits(num_tokens: int, num_experts: int = 4, seed: int = 0) -> Tensor:
    """Return fp64 logits, all different."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
