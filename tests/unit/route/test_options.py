"""What cannot work together is refused, with option, value, rule and the way out."""

import logging
import re

import pytest
from helpers.choosing import options

from megatron_moe.config import MoEConfig
from megatron_moe.route.options import routing_faults, warn_if_unbalanced

BIAS, GROUPS = {"moe_router_enable_expert_bias": True}, {"moe_router_group_topk": 1}
AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
FUTURE = {"router_choice": "expert_choice", "allow_future_tokens": True}
CAPACITY = {"moe_expert_capacity_factor": 1.0}

WRONG = [
    ({}, {"router_choice": "best"}, r"router_choice \(best\) must be one of expert_choice, gsh"),
    ({}, {"router_choice": "switch"}, r"router_choice switch needs moe_router_topk 1, not 2"),
    (
        {"moe_router_topk": 1, "moe_router_score_function": "sigmoid"},
        {"router_choice": "switch"},
        r"needs moe_router_score_function softmax, not sigmoid; use router_choice topk",
    ),
    (
        {"moe_router_topk": 4},
        {"router_choice": "gshard"},
        r"router_choice gshard needs moe_router_topk 2, not 4",
    ),
    (
        {},
        {"router_choice": "expert_choice"},
        r"depend on later tokens, .*use router_choice topk, or add --moe-allow-future-tokens",
    ),
    (
        CAPACITY,
        FUTURE,
        r"moe_expert_capacity_factor \(1.0\) has no meaning with router_choice expert_choice",
    ),
    (
        BIAS,
        FUTURE,
        r"enable_expert_bias \(True\) has no effect with router_choice expert_choice: drop",
    ),
    (
        {"pipeline_model_parallel_size": 2},
        {"router_choice": "hash"},
        r"hash needs the token ids, .*pipeline_model_parallel_size \(2\) must be 1",
    ),
    (BIAS, {"router_choice": "hash"}, r"enable_expert_bias \(True\) has no effect with .*hash"),
    (
        {"moe_router_load_balancing_type": "sinkhorn"} | BIAS,
        {},
        r"moe_router_enable_expert_bias \(True\) has no effect with router_choice sinkhorn: drop",
    ),
    (
        {"moe_router_load_balancing_type": "sinkhorn", "moe_router_topk_scaling_factor": 2.5},
        {},
        r"moe_router_topk_scaling_factor \(2.5\) has no effect with router_choice sinkhorn",
    ),
    (
        {"moe_router_num_groups": 2} | GROUPS,
        {"router_choice": "top_p"},
        r"moe_router_group_topk \(\d\) has no effect with router_choice \w+: drop --moe",
    ),
    (AUX, FUTURE, r"router_choice expert_choice balances by itself, so a balancing loss would"),
    (
        {},
        {"router_choice": "hash", "balance_losses": ("kl@global=0.1",)},
        r"router_choice hash balances by itself",
    ),
    (
        {"moe_router_load_balancing_type": "quantile_balancing"} | BIAS,
        {},
        r"has no effect with router_choice quantile: drop --moe-router",
    ),
    (
        {"moe_router_load_balancing_type": "quantile_balancing"},
        {"router_choice": "gshard"},
        r"\(quantile_balancing\) chooses the experts by itself: give it alone",
    ),
    ({"moe_router_topk": 1}, {}, r"weighs every token with 1, .*add --moe-router-pre-softmax"),
    (
        {"moe_router_topk": 1, "moe_router_load_balancing_type": "quantile_balancing"},
        {},
        r"weighs every token with 1, .*add --moe-router-pre-softmax",
    ),
    ({"moe_router_topk": 5}, {}, r"moe_router_topk \(5\) must be between 1 and .*\(4\)"),
    (
        {"moe_router_num_groups": 3} | GROUPS,
        {},
        r"moe_router_group_topk \(1\) needs moe_router_num_groups \(3\) that divides",
    ),
    (
        {"moe_router_num_groups": 4, "moe_router_group_topk": 1},
        {},
        r"moe_router_topk \(2\) must be a multiple of .*with at most 1 experts taken from a group",
    ),
    (
        AUX | {"moe_router_load_balancing_type": "fair"},
        {},
        r"moe_router_load_balancing_type \(fair\) must be one of aux_loss, seq_aux_loss",
    ),
    (
        {"moe_aux_loss_coeff": 0.1},
        {},
        r"moe_aux_loss_coeff \(0.1\) does nothing with moe_router_load_balancing_type none",
    ),
    ({}, {"balance_losses": ("kl=1",)}, r"balance_losses \(kl=1\) must be written NAME@SCOPE"),
    (
        {},
        {"balance_layer_weights": (1.0,)},
        r"balance_layer_weights has 1 values; it needs one for each of the 2 layers",
    ),
    ({}, {"min_capacity": 4}, r"min_capacity \(4\) does nothing without moe_expert_capacity"),
    ({}, {"eval_capacity_factor": 2.0}, r"eval_capacity_factor \(2.0\) does nothing without"),
    ({}, {"drop_order": "random"}, r"drop_order \(random\) does nothing without"),
    (CAPACITY, {"min_capacity": -1}, r"min_capacity \(-1\) and .* must not be negative"),
    (
        CAPACITY | {"moe_pad_expert_input_to_capacity": True},
        {"capacity_scope": "global"},
        r"capacity_scope global cannot be padded to capacity, .*use --moe-capacity-scope rank",
    ),
    (
        CAPACITY | {"moe_token_drop_policy": "fair"},
        {},
        r"moe_token_drop_policy \(fair\) must be probs or position",
    ),
    ({}, {"logit_noise_std": -1.0}, r"logit_noise_std \(-1.0\) must not be negative"),
    ({}, {"sinkhorn_iterations": 0}, r"sinkhorn_iterations \(0\) must be at least 1"),
    ({}, {"context_length": 0}, r"context_length \(0\) must be at least 1"),
    ({}, {"routing_verify": True}, r"routing_verify needs the folder of a record: add"),
]


@pytest.mark.parametrize(("fields", "moe", "message"), WRONG, ids=lambda x: str(x)[:50])
def test_wrong_options(fields, moe, message):
    faults = routing_faults(options(**fields), MoEConfig(**moe))
    assert len(faults) == 1, faults
    assert re.search(message, faults[0]), faults


def test_all_faults_at_once():
    moe = MoEConfig(router_choice="switch", sinkhorn_iterations=0, min_capacity=4)
    faults = routing_faults(options(moe_aux_loss_coeff=0.5), moe)
    assert len(faults) == 4


RIGHT = [
    ({}, {}),
    (AUX, {"balance_losses": ("kl@sequence=0.1",), "balance_layer_weights": (1.0, 0.5)}),
    ({"moe_router_topk": 1}, {"router_choice": "switch"}),
    ({"moe_router_topk": 1, "moe_router_pre_softmax": True}, {}),
    ({"moe_router_topk": 1, "moe_router_score_function": "sigmoid"}, {}),
    ({}, FUTURE),
    ({}, {"router_choice": "top_p", "k_min": 2, "k_max": 3, "target_k": 2.5}),
    ({}, {"router_choice": "threshold", "target_k": -1.0, "router_cut": 0.3}),
    ({"moe_router_load_balancing_type": "sinkhorn"}, {}),
    ({"moe_router_load_balancing_type": ["aux_loss"], "moe_aux_loss_coeff": [0.1]}, {}),
    (CAPACITY, {"min_capacity": 4, "eval_capacity_factor": 2.0, "drop_order": "prioritised"}),
]


@pytest.mark.parametrize(("fields", "moe"), RIGHT, ids=lambda x: str(x)[:50])
def test_right_options(fields, moe):
    assert routing_faults(options(**fields), MoEConfig(**moe)) == []


def test_a_router_that_nothing_balances_is_told_once(caplog, monkeypatch):
    monkeypatch.setattr("megatron_moe.route.options._warned", set())
    silent = options(moe_router_load_balancing_type="aux_loss")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            warn_if_unbalanced(silent, MoEConfig())
    assert len(caplog.messages) == 1
    assert "aux_loss has moe_aux_loss_coeff 0, so experts may die; add" in caplog.messages[0]


@pytest.mark.parametrize(
    ("fields", "moe"),
    [
        ({}, {}),  # load balancing type none is an answer
        (AUX, {}),
        ({"moe_router_load_balancing_type": "aux_loss"} | BIAS, {}),
        ({"moe_router_load_balancing_type": "sinkhorn"}, {}),
        ({"moe_router_load_balancing_type": "aux_loss"}, FUTURE),
        ({"moe_router_load_balancing_type": "aux_loss"}, {"balance_losses": ("kl@global=0.1",)}),
    ],
)
def test_a_balanced_router_is_told_nothing(fields, moe, caplog, monkeypatch):
    monkeypatch.setattr("megatron_moe.route.options._warned", set())
    with caplog.at_level(logging.WARNING):
        warn_if_unbalanced(options(**fields), MoEConfig(**moe))
    assert not caplog.messages
