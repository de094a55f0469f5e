"""What a variant is (a few options on the same model), and the routers that are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BASELINE = "topk"
AUX_COEFF = 0.01


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train the model.

    Args:
        name: As given to ``--variants``.
        family: What it varies; a row of the picture.
        says: What it is, for the table.
        against: Name of the variant that its loss and churn are compared with.
        unbalanced: Name of the variant that shows its load without balancing; "" where there is
            none, or nothing balances it.
        model: Fields of ``TransformerConfig`` that differ from the baseline's.
        moe: Fields of ``MoEConfig`` that differ from the default.
        schedule: Fields of ``MoEConfig`` that are given as a share of the run's steps.
        widen: Factor on the experts' width, so that a token meets the same arithmetic with fewer.
        leaks: Whether its loss may use the token to be predicted, and so compares with none.
        precision: ``fp32``, ``bf16`` or ``fp16``: of weights and activations.
    """

    name: str
    family: str
    says: str
    against: str = BASELINE
    unbalanced: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    moe: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, float] = field(default_factory=dict)
    widen: int = 1
    leaks: bool = False
    precision: str = "fp32"


UNBALANCED = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
SIGMOID = {"moe_router_score_function": "sigmoid"}


def _aux(kind: str, coeff: float = AUX_COEFF) -> dict[str, Any]:
    return {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": coeff}


def _kl(scope: str, coeff: float = AUX_COEFF) -> dict[str, Any]:
    return {"model": UNBALANCED, "moe": {"balance_losses": (f"kl@{scope}={coeff}",)}}


def _balanced(
    name: str,
    says: str,
    model: Mapping[str, Any],
    moe: Mapping[str, Any] | None = None,
    control: str = "none",
) -> Variant:
    return Variant(
        name=name,
        family="balance",
        says=says,
        against=control,
        unbalanced=control,
        model=model,
        moe=moe or {},
    )


_BIASED = {
    **UNBALANCED,
    **SIGMOID,
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.005,  # the default, 0.001, is for runs many times as long
}


def _full(policy: str, **moe: Any) -> dict[str, Any]:
    limited = {"moe_expert_capacity_factor": 1.0, "moe_token_drop_policy": policy}
    return {"model": limited, "moe": moe}


_CHOICE = (
    Variant(name=BASELINE, family="choice", says="softmax top-2, Switch loss 0.01",
            unbalanced="none"),
    Variant(name="sigmoid", family="choice", says="sigmoid top-2, Switch loss", model=SIGMOID,
            unbalanced="sigmoid-none"),
    Variant(name="switch", family="choice", says="top-1 of experts twice as wide",
            model={"moe_router_topk": 1, "moe_router_pre_softmax": True},
            moe={"router_choice": "switch"}, widen=2),
    Variant(name="gshard", family="choice", says="top-2, the second drawn at random",
            moe={"router_choice": "gshard", "second_expert": "random"}),
    Variant(name="groups", family="choice", says="top-2 from the better half of the experts",
            model={"moe_router_num_groups": 2, "moe_router_group_topk": 1}),
    Variant(name="expert-choice", family="choice", says="experts choose their tokens (leaks)",
            model=UNBALANCED, leaks=True,
            moe={"router_choice": "expert_choice", "allow_future_tokens": True}),
    Variant(name="sinkhorn", family="choice", says="top-2 of a balanced assignment",
            model={"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0}),
    Variant(name="hash", family="choice", says="a fixed hash of the token",
            model=UNBALANCED, moe={"router_choice": "hash"}),
    Variant(name="top-p", family="choice", says="as many as hold probability p, 2 on average",
            moe={"router_choice": "top_p"}),
    Variant(name="threshold", family="choice", says="all above a threshold, 2 on average",
            moe={"router_choice": "threshold"}),
)  # fmt: skip

_BALANCE = (
    Variant(name="none", family="balance", says="no balancing", model=UNBALANCED),
    _balanced("strong", "Switch loss 0.1, ten times as strong", _aux("aux_loss", 10 * AUX_COEFF)),
    _balanced("sequence", "Switch loss 0.01 in each sequence", _aux("seq_aux_loss")),
    _balanced("global", "Switch loss 0.01, global batch", _aux("global_aux_loss")),
    _balanced("kl", "KL to uniform 0.01, micro-batch", **_kl("micro_batch")),
    _balanced("kl-strong", "KL to uniform 0.1, micro-batch", **_kl("micro_batch", 10 * AUX_COEFF)),
    _balanced("kl-global", "KL to uniform 0.01, global batch", **_kl("global")),
    _balanced("z-loss", "z-loss 0.001 alone", UNBALANCED | {"moe_z_loss_coeff": 1e-3}),
    _balanced("quantile", "quantile balancing",
              {"moe_router_load_balancing_type": "quantile_balancing", "moe_aux_loss_coeff": 0.0}),
    Variant(name="sigmoid-none", family="balance", says="sigmoid, no balancing", against="none",
            model=UNBALANCED | SIGMOID),
    _balanced("bias-sign", "sigmoid, bias by the sign", _BIASED, control="sigmoid-none"),
    _balanced("bias-centred", "sigmoid, bias mean-centred", _BIASED, control="sigmoid-none",
              moe={"expert_bias_update": "centred"}),
)  # fmt: skip

_CAPACITY = (
    Variant(name="capacity-probs", family="capacity", says="factor 1.0, the lightest dropped",
            **_full("probs")),
    Variant(name="capacity-position", family="capacity", says="factor 1.0, the last dropped",
            **_full("position")),
    Variant(name="capacity-random", family="capacity", says="factor 1.0, dropped at random",
            **_full("probs", drop_order="random")),
    Variant(name="capacity-priority", family="capacity", says="factor 1.0, batch-prioritised",
            **_full("probs", drop_order="prioritised")),
)  # fmt: skip

_STABILITY = (
    Variant(name="hysteresis", family="stability", says="the previous choice keeps a margin",
            moe={"hysteresis_margin": 0.5}),
    Variant(name="pretrain", family="stability", says="only the router learns for 1/10 of the run",
            schedule={"gate_pretrain_iters": 0.1}),
    Variant(name="freeze", family="stability", says="the router is frozen after half of the run",
            schedule={"router_freeze_iter": 0.5}),
    Variant(name="noise", family="stability", says="jitter and logit noise, gone after half",
            model={"moe_input_jitter_eps": 0.01}, moe={"logit_noise_std": 0.2},
            schedule={"noise_anneal_iters": 0.5}),
)  # fmt: skip

VARIANTS = {v.name: v for v in (*_CHOICE, *_BALANCE, *_CAPACITY, *_STABILITY)}
