"""The balancing losses: the written formula, its floor, its ceiling, and its scope."""

import torch
from helpers.reference_moe import balance_loss
from helpers.tolerances import assert_same

from megatron_moe.route.balance import switch_loss, z_loss
from megatron_moe.route.scores import count_choices


def _case(num_tokens=12, num_experts=4, topk=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    scores = logits.softmax(-1)
    indices = logits.topk(topk, dim=-1).indices
    return logits, scores, indices


def test_equals_the_formula():
    _, scores, indices = _case()
    chosen = torch.zeros(12, 4, dtype=torch.bool).scatter(1, indices, True)
    found = switch_loss(scores, count_choices(indices, 4), 12, 2)
    assert_same(found, balance_loss(scores, chosen, 2))


def test_is_one_when_balanced_and_the_number_of_experts_when_one_takes_all():
    uniform = torch.full((8, 4), 0.25, dtype=torch.float64)
    assert_same(switch_loss(uniform, torch.full((4,), 2), 8, 1), torch.tensor(1.0).double())
    one = torch.zeros(8, 4, dtype=torch.float64)
    one[:, 0] = 1
    assert_same(switch_loss(one, torch.tensor([8, 0, 0, 0]), 8, 1), torch.tensor(4.0).double())


def test_summands_of_ranks_add_up():
    _, scores, indices = _case()
    counts = count_choices(indices, 4)
    whole = switch_loss(scores, counts, 12, 2)
    parts = sum(switch_loss(part, counts, 12, 2) for part in scores.split([5, 0, 7]))
    assert_same(parts, whole)


def test_several_sequences_at_once():
    _, scores, indices = _case()
    by_sequence = [count_choices(indices[b::3], 4) for b in range(3)]
    found = switch_loss(
        scores.unflatten(0, (-1, 3)), torch.stack(by_sequence), torch.full((3,), 4), 2
    )
    expected = [switch_loss(scores[b::3], by_sequence[b], 4, 2) for b in range(3)]
    assert_same(found, torch.stack(expected))


def test_empty_scope_gives_zero():
    assert switch_loss(torch.zeros(0, 4), torch.zeros(4).long(), 0, 2).item() == 0.0
    assert z_loss(torch.zeros(0, 4), 0).item() == 0.0


def test_gradient_matches_finite_differences():
    logits, _, indices = _case(num_tokens=3)
    counts = count_choices(indices, 4)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: switch_loss(x.softmax(-1), counts, 3, 2), logits)
    assert torch.autograd.gradcheck(lambda x: z_loss(x, 3), logits)


def test_z_loss_ignores_padding():
    logits, _, _ = _case()
    valid = torch.arange(12) < 7
    found = z_loss(logits, valid.sum(), valid)
    assert_same(found, logits[:7].logsumexp(-1).square().mean())
