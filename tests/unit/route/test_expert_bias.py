"""Balancing by a bias: exact steps, exact counts, no effect on weights."""

import pytest
import torch
from helpers.alone import alone
from helpers.choosing import build, options, pick, random_logits, tokens_of
from helpers.tolerances import assert_same

from megatron_moe.config import MoEConfig
from megatron_moe.route.bias import ExpertBias
from megatron_moe.route.decision import Picked
from megatron_moe.route.part import end_global_batch


def bias_of(update="sign", num_experts=4, rate=0.125):
    fields = {"num_moe_experts": num_experts, "moe_router_bias_update_rate": rate}
    part = ExpertBias(options(**fields), MoEConfig(expert_bias_update=update))
    part.state = {
        **part.buffers(),
        "local_tokens_per_expert": torch.zeros(num_experts, dtype=torch.int64),
    }
    return part


def observe(part, indices, chosen=None):
    part.observe(tokens_of(torch.zeros(len(indices), 4)), Picked(indices, chosen))


@pytest.mark.parametrize(
    ("update", "steps"),
    [("sign", [-1.0, 1.0, 1.0, 0.0]), ("centred", [-1.25, 0.75, 0.75, -0.25])],
)
def test_steps(update, steps):
    part = bias_of(update)
    observe(part, torch.tensor([[0, 3], [0, 1], [0, 3], [2, 0]]))  # loads 4 1 1 2, mean 2
    end_global_batch([part], alone().tp_dp_cp)
    assert_same(part.state["expert_bias"], 0.125 * torch.tensor(steps))
    assert not part.state["local_tokens_per_expert"].any()


def test_centred_steps_never_move_the_mean():
    part = bias_of("centred", rate=0.01)
    for seed in range(50):
        observe(part, random_logits(7, 4, seed).topk(2, dim=1).indices)
        end_global_batch([part], alone().tp_dp_cp)
    assert part.state["expert_bias"].mean().abs() < 1e-7
    assert part.state["expert_bias"].abs().max() > 0


def test_one_choice_more_in_many_millions_is_seen():
    part = bias_of()
    part.state["local_tokens_per_expert"] += 2**40
    part.state["local_tokens_per_expert"][2] += 1
    end_global_batch([part], alone().tp_dp_cp)
    assert part.state["expert_bias"].sign().tolist() == [1, 1, -1, 1]


def test_places_without_a_choice_are_not_counted():
    part = bias_of()
    observe(part, torch.tensor([[0, 1], [0, 1]]), torch.tensor([[True, False], [True, True]]))
    assert part.summary().tolist() == [2, 1, 0, 0]


def test_a_frozen_bias_stays():
    part = bias_of()
    part.frozen = True
    observe(part, torch.tensor([[0, 1]]))
    end_global_batch([part], alone().tp_dp_cp)
    assert not part.state["expert_bias"].any()
    assert not part.state["local_tokens_per_expert"].any()


def test_routers_with_other_numbers_of_experts_share_one_sum():
    small, large = bias_of(num_experts=2), bias_of(num_experts=6)
    observe(small, torch.tensor([[0], [0]]))
    observe(large, torch.tensor([[5, 4], [5, 3]]))
    end_global_batch([small, large], alone().tp_dp_cp)
    assert small.state["expert_bias"].tolist() == [-0.125, 0.125]
    assert large.state["expert_bias"].sign().tolist() == [1, 1, 1, -1, -1, -1]


@pytest.mark.parametrize("name", ["topk", "gshard", "top_p", "threshold"])
def test_the_bias_chooses_and_does_not_weigh(name):
    choice = build(name, MoEConfig(router_cut=0.4), moe_router_score_function="sigmoid")
    logits, bias = random_logits(9), torch.tensor([0.0, 0.0, 10.0, 0.0])
    biased = pick(choice, tokens_of(logits, bias_TE=bias))
    assert (biased.indices_TK[:, 0] == 2).all()
    weights, again = (choice.weigh(logits, picked) for picked in (biased, biased))
    assert torch.equal(weights, again)
    assert weights.max() <= 1


def test_a_bias_of_tokens_is_taken_too():
    logits, bias = random_logits(4), torch.zeros(4, 4)
    bias[1, 3] = bias[2, 0] = 100.0
    picked = pick(build("topk", moe_router_topk=1), tokens_of(logits, bias_TE=bias))
    expected = logits.argmax(1)
    expected[1:3] = torch.tensor([3, 0])
    assert picked.indices_TK.flatten().tolist() == expected.tolist()
