"""Every router option against the loop over tokens and experts."""

import pytest
import torch
from helpers.reference_moe import ReferenceRouter
from helpers.reference_moe import balance_scores as reference_balance_scores
from helpers.reference_moe import choose as reference_choose
from helpers.tolerances import assert_same
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.route.choices.topk import pick_topk
from megatron_moe.route.decision import Picked, Routing, count_choices
from megatron_moe.route.scores import balance_scores, score, weigh_chosen

OPTIONS = [
    {},
    {"pre_softmax": True},
    {"pre_softmax": True, "scaling_factor": 2.5},
    {"score_function": "sigmoid"},
    {"score_function": "sigmoid", "biased": True},
    {"score_function": "sqrtsoftplus", "scaling_factor": 1.5},
    {"num_groups": 4, "group_topk": 2},
    {"score_function": "sigmoid", "biased": True, "num_groups": 2, "group_topk": 1},
]


def choose(logits, topk, *, bias_TE=None, scaling_factor=None, **options):
    picked = pick_topk(logits, topk, bias_TE=bias_TE, **options)
    kinds = {k: options[k] for k in ("score_function", "pre_softmax") if k in options}
    probs = weigh_chosen(logits, picked, scaling_factor=scaling_factor, **kinds)
    return probs, picked.indices_TK


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o)) or "softmax")
@given(tokens=st.integers(0, 7), topk=st.sampled_from([2, 4]), seed=st.integers(0, 2**31))
def test_choice_equals_the_loop(options, tokens, topk, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, 8, generator=generator, dtype=torch.float64)
    options = dict(options)
    bias = None
    if options.pop("biased", False):
        bias = torch.randn(8, generator=generator, dtype=torch.float64) * 0.3
    probs_TK, indices_TK = choose(logits, topk, bias_TE=bias, **options)
    probs_TE, map_TE = Routing(indices_TK, probs_TK, 8).dense()
    reference = ReferenceRouter(topk=topk, expert_bias_E=bias, **options)
    expected_probs, expected_map = reference_choose(logits, reference, [True] * tokens)
    assert torch.equal(map_TE, expected_map)
    assert_same(probs_TE, expected_probs, "probs")


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_balance_scores_sum_to_one(score_function):
    logits = torch.randn(5, 8, dtype=torch.float64)
    scores = balance_scores(logits, score_function)
    assert_same(scores.sum(-1), torch.ones(5, dtype=torch.float64))
    assert_same(scores, reference_balance_scores(logits, score_function))


def test_scores_are_fp32_for_half_precision_logits_and_probs_keep_their_dtype():
    logits = torch.randn(4, 8).bfloat16()
    assert score(logits, "softmax").dtype == torch.float32
    assert choose(logits, 2)[0].dtype == torch.bfloat16


def test_choices_are_weighted_by_scores_without_the_bias():
    logits = torch.zeros(1, 4)
    bias = torch.tensor([0.0, 5.0, 0.0, 0.0])
    probs, indices = choose(logits, 1, score_function="sigmoid", bias_TE=bias)
    assert indices.item() == 1
    assert probs.item() == 0.5


def test_gradient_reaches_the_router_with_one_choice():
    logits = torch.randn(6, 4, requires_grad=True)
    choose(logits, 1, pre_softmax=True)[0].sum().backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0


def test_counts_leave_out_what_is_not_valid():
    indices = torch.tensor([[0, 1], [1, 3], [1, 0]])
    valid = torch.tensor([[True, True], [True, False], [False, False]])
    assert count_choices(indices, 4).tolist() == [2, 3, 0, 1]
    assert count_choices(indices, 4, valid).tolist() == [1, 2, 0, 0]
    assert count_choices(indices, 4).dtype == torch.int64


def test_unknown_score_function():
    with pytest.raises(ValueError, match=r"moe_router_score_function \(tanh\) must be softmax"):
        score(torch.zeros(1, 2), "tanh")


@pytest.mark.parametrize("score_function", ["sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("level", [-30.0, -50.0, -120.0, -1e4])
def test_scores_stay_a_distribution_where_they_underflow(score_function, level):
    logits = torch.tensor([[0.0, 1.0, 2.0, 0.5]]) + level
    logits.requires_grad_()
    scores = balance_scores(logits, score_function)
    assert_same(scores.sum(), torch.tensor(1.0))
    assert scores.argmax().item() == 2
    scores.square().sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad.any()


def test_weights_of_places_without_a_choice_take_nothing_from_the_others():
    picked = Picked(torch.tensor([[0, 1, 2]]), torch.tensor([[True, True, False]]))
    probs = weigh_chosen(torch.tensor([[1.0, 0.0, 5.0]]), picked)
    assert_same(probs[0, :2], torch.tensor([1.0, 0.0]).softmax(0))
