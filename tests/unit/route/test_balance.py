"""The balancing losses: the written formula, its floor, its ceiling, its scope, its gradient."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.reference_moe import balance_loss
from helpers.tolerances import assert_same

from megatron_moe.config import MoEConfig
from megatron_moe.route.balance import balance_losses, kl, summand, switch, z_loss
from megatron_moe.route.decision import count_choices


def _case(num_tokens=12, num_experts=4, topk=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    scores = logits.softmax(-1)
    indices = logits.topk(topk, dim=-1).indices
    return logits, scores, indices


def _shares(indices, num_experts=4):
    return count_choices(indices, num_experts).double() / indices.numel()


def test_switch_equals_the_formula():
    _, scores, indices = _case()
    chosen = torch.zeros(12, 4, dtype=torch.bool).scatter(1, indices, True)
    assert_same(switch(scores.mean(0), _shares(indices)), balance_loss(scores, chosen, 2))


def test_kl_equals_the_formula():
    _, scores, indices = _case()
    mean = scores.mean(0).tolist()
    expected = math.log(4) + sum(p * math.log(p) for p in mean)
    assert_same(kl(scores.mean(0), _shares(indices)), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("loss", "floor", "ceiling"), [(switch, 1.0, 4.0), (kl, 0.0, math.log(4))])
def test_floor_and_ceiling(loss, floor, ceiling):
    uniform, one = torch.full((4,), 0.25), torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert_same(loss(uniform, uniform), torch.tensor(floor))
    assert_same(loss(one, one), torch.tensor(ceiling))


@pytest.mark.parametrize("loss", [switch, kl])
def test_summands_of_ranks_add_up_in_value_and_gradient(loss):
    logits, _, indices = _case()
    logits.requires_grad_()
    shares = _shares(indices)
    (expected,) = torch.autograd.grad(loss(logits.softmax(-1).mean(0), shares), logits)
    scores = logits.softmax(-1)
    n = torch.tensor(12.0).double()
    parts = [
        summand(loss, part.sum(0), scores.mean(0), shares, n, 3) for part in scores.split([5, 0, 7])
    ]
    assert_same(sum(parts).detach(), loss(scores.mean(0), shares).detach())
    (found,) = torch.autograd.grad(sum(parts), logits)
    assert_same(found, expected)


@pytest.mark.parametrize("loss", [switch, kl])
def test_gradient_matches_finite_differences(loss):
    logits, _, indices = _case(num_tokens=3)
    shares, n, step = _shares(indices), torch.tensor(3.0).double(), 1e-6

    def value(x):
        return loss(x.softmax(-1).mean(0), shares)

    logits.requires_grad_()
    scores = logits.softmax(-1)
    summand(loss, scores.sum(0), scores.mean(0), shares, n, 1).backward()
    for t in range(3):
        for e in range(4):
            bump = torch.zeros_like(logits)
            bump[t, e] = step
            slope = (value(logits + bump) - value(logits - bump)) / (2 * step)
            torch.testing.assert_close(logits.grad[t, e], slope.detach(), rtol=1e-6, atol=1e-9)


def test_several_sequences_at_once():
    _, scores, indices = _case()
    means = torch.stack([scores[b::3].mean(0) for b in range(3)])
    shares = torch.stack([_shares(indices[b::3]) for b in range(3)])
    sums = torch.stack([scores[b::3].sum(0) for b in range(3)])
    found = summand(switch, sums, means, shares, torch.full((3,), 4.0).double(), 1)
    assert_same(found, torch.stack([switch(means[b], shares[b]) for b in range(3)]))


def test_empty_scope_gives_zero():
    empty = torch.zeros(4)
    for loss in (switch, kl):
        assert summand(loss, empty, empty, empty, torch.tensor(0.0), 1).item() == 0.0
    assert z_loss(torch.zeros(0, 4), 0).item() == 0.0


def test_z_loss_ignores_padding_and_its_gradient_is_right():
    logits, _, _ = _case()
    valid = torch.arange(12) < 7
    found = z_loss(logits, valid.sum(), valid)
    assert_same(found, logits[:7].logsumexp(-1).square().mean())
    assert torch.autograd.gradcheck(lambda x: z_loss(x, 3), logits[:3].requires_grad_())


def _options(kinds="none", coeffs=0.0):
    return SimpleNamespace(moe_router_load_balancing_type=kinds, moe_aux_loss_coeff=coeffs)


def test_options_of_megatron_and_of_ours_together():
    config = _options(["aux_loss", "seq_aux_loss"], [0.1, 0.0])
    found = balance_losses(
        config, MoEConfig(balance_losses=("kl@global=0.02", "switch@sequence=0"))
    )
    assert [(x.scope, x.coeff, x.log_name) for x in found] == [
        ("micro_batch", 0.1, "load_balancing_loss"),
        ("global", 0.02, "kl_global_balance_loss"),
    ]


def test_a_loss_from_outside():
    found = balance_losses(_options(), MoEConfig(balance_losses=(f"{__name__}:mine@sequence=1",)))
    assert found[0].log_name == "mine_sequence_balance_loss"
    assert found[0].function(torch.ones(3), torch.ones(3)).item() == 3.0


def mine(mean_scores_E, shares_E):
    return (mean_scores_E * shares_E).sum(-1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl=0.1", r"balance_losses \(kl=0.1\) must be written NAME@SCOPE=COEFFICIENT"),
        ("kl@day=0.1", r"with a scope of micro_batch, sequence, global"),
        ("entropy@global=0.1", r"balance_losses \(entropy\) must be one of kl, switch"),
        ("kl@global=1e", r"1e is not a number"),
        ("no_such:f@global=1", r"cannot be imported: No module named 'no_such'"),
    ],
)
def test_wrong_options(text, message):
    with pytest.raises(ValueError, match=message):
        balance_losses(_options(), MoEConfig(balance_losses=(text,)))
