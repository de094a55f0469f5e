"""The documented choice of one's own works as it stands in the examples."""

from pathlib import Path

import torch
from helpers.choosing import build, options, pick, tokens_of

from megatron_moe.config import MoEConfig
from megatron_moe.route.choice import choice_named

NAME = "own_choice:NoisyTopK"


def test_the_example_is_found_by_module_and_class_and_then_by_its_name(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    choice = build(NAME, MoEConfig(), num_moe_experts=8)
    logits = torch.randn(50, 8)
    best = logits.topk(2).indices
    assert torch.equal(pick(choice, tokens_of(logits, training=False)).indices_TK, best)
    noisy = pick(choice, tokens_of(logits, training=True)).indices_TK
    assert not torch.equal(noisy, best)
    assert (noisy[:, 0] != noisy[:, 1]).all()
    assert choice_named("noisy_topk") is type(choice)


def test_its_own_rule_is_told(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    config = options(num_moe_experts=8, moe_router_score_function="sigmoid")
    assert choice_named(NAME).faults(config, MoEConfig()) == [
        "NoisyTopK needs moe_router_score_function softmax"
    ]
