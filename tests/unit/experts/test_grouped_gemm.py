"""Grouped GEMMs: every form against one matrix product an expert."""

import pytest
import torch
from helpers.tolerances import assert_same

from megatron_moe.experts.grouped_gemm import choose_form, grouped_linear

FORMS = [
    ("loop", torch.float64),
    ("loop", torch.float32),
    ("grouped_mm", torch.float32),
    ("grouped_mm", torch.bfloat16),
]
W = torch.empty(1, 16, 8)
ROWS = [[3, 0, 5], [0, 0, 0], [8], [0, 7], [1, 1, 1, 1]]


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize(("form", "dtype"), FORMS, ids=str)
def test_forward_and_gradients(form, dtype, rows):
    torch.manual_seed(0)
    x = torch.randn(sum(rows), 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(len(rows), 16, 8, dtype=dtype, requires_grad=True)
    out = grouped_linear(x, weight, rows, form)
    grad = torch.randn_like(out)
    found = (out, *torch.autograd.grad(out, (x, weight), grad))

    parts = [a @ w.T for a, w in zip(x.split(rows), weight.unbind(0), strict=True)]
    expected_out = torch.cat(parts)
    expected = (expected_out, *torch.autograd.grad(expected_out, (x, weight), grad))
    for name, ours, theirs in zip(("out", "x.grad", "weight.grad"), found, expected, strict=True):
        assert_same(ours, theirs, name)


@pytest.mark.parametrize("form", ["loop", "grouped_mm"])
def test_expert_without_rows_gets_a_zero_gradient_not_none(form):
    weight = torch.randn(2, 5, 8, requires_grad=True)
    grouped_linear(torch.randn(3, 8), weight, [3, 0], form).sum().backward()
    assert weight.grad is not None
    assert weight.grad[1].count_nonzero() == 0
    assert weight.grad[0].count_nonzero() > 0


def test_odd_widths_are_computed_all_the_same():
    x, weight = torch.randn(4, 7), torch.randn(2, 5, 7)
    out = grouped_linear(x, weight, [1, 3], "grouped_mm")
    assert_same(out, torch.cat([x[:1] @ weight[0].T, x[1:] @ weight[1].T]))


def test_one_row_whose_stride_is_arbitrary():
    x = torch.randn(3, 8).as_strided((1, 8), (3, 1)).requires_grad_()
    weight = torch.randn(2, 16, 8, requires_grad=True)
    out = grouped_linear(x, weight, [0, 1], "grouped_mm")
    out.sum().backward()
    assert_same(out, x @ weight[1].T)
    assert_same(x.grad, weight[1].sum(0, keepdim=True))


def test_gradcheck():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, w: grouped_linear(a, w, [1, 0, 3], "loop"), (x, weight)
    )


def test_auto_falls_back_where_grouped_mm_does_not_run():
    cpu = torch.device("cpu")
    assert choose_form("auto", cpu, torch.float32, W, [8]) == "grouped_mm"
    assert choose_form("auto", cpu, torch.int32, W, [8]) == "loop"
    assert choose_form("loop", cpu, torch.float32, W, [8]) == "loop"
    with pytest.raises(ValueError, match=r"moe_expert_gemm \(grouped_mm\) does not run on cpu"):
        choose_form("grouped_mm", cpu, torch.int32, W, [8])
