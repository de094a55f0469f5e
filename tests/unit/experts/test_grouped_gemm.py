"""Grouped GEMMs: every form, under every load, against one matrix product an expert."""

import pytest
import torch
from helpers.tolerances import assert_same
from torch.nn import functional as F

from megatron_moe.experts.forms import FORMS, Form
from megatron_moe.experts.fp8 import Fp8Emulation, Fp8Recipe
from megatron_moe.experts.grouped_gemm import choose_form, grouped_linear

TRIED = [
    ("loop", torch.float64),
    ("loop", torch.float32),
    ("loop", torch.float16),
    ("grouped_mm", torch.float32),
    ("grouped_mm", torch.bfloat16),
    ("grouped_mm", torch.float16),
    ("batched", torch.float64),
    ("batched", torch.bfloat16),
]
W = torch.empty(1, 16, 8)
LOADS = {
    "ragged": [3, 0, 5],
    "nobody": [0, 0, 0],
    "one expert": [8],
    "one of two": [0, 7],
    "one row each": [1, 1, 1, 1],
    "balanced": [4, 4, 4, 4],
    "hot expert": [1, 29, 2, 0],
    "hot half": [13, 11, 0, 0],
    "burst": [0, 0, 64, 0],
}


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody has written is NaN: a row left out of a result shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert W.new_empty(1).isnan().all() and torch.empty_like(W).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def operands(rows, dtype=torch.float32, ffn=16, hidden=8):
    torch.manual_seed(0)
    x = torch.randn(sum(rows), hidden, dtype=dtype, requires_grad=True)
    weight = torch.randn(len(rows), ffn, hidden, dtype=dtype, requires_grad=True)
    return x, weight


def by_expert(x, weight, rows):
    parts = zip(x.split(rows), weight.unbind(0), strict=True)
    return torch.cat([a @ w.T for a, w in parts])


@pytest.mark.parametrize("rows", LOADS.values(), ids=LOADS.keys())
@pytest.mark.parametrize(("form", "dtype"), TRIED, ids=str)
def test_forward_and_gradients(form, dtype, rows):
    x, weight = operands(rows, dtype)
    out = grouped_linear(x, weight, rows, form)
    grad = torch.randn_like(out)
    found = (out, *torch.autograd.grad(out, (x, weight), grad))
    expected_out = by_expert(x, weight, rows)
    expected = (expected_out, *torch.autograd.grad(expected_out, (x, weight), grad))
    for name, ours, theirs in zip(("out", "x.grad", "weight.grad"), found, expected, strict=True):
        assert_same(ours, theirs, name)


def test_loads_that_rotate_leave_nothing_behind():
    rows = [9, 0, 2, 5]
    for _ in rows:
        rows = [*rows[1:], rows[0]]
        x, weight = operands(rows)
        outs = [grouped_linear(x, weight, rows, form) for form in ("loop", "grouped_mm", "batched")]
        for out in outs:
            assert_same(out, by_expert(x, weight, rows))


@pytest.mark.parametrize("form", ["loop", "grouped_mm", "batched"])
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


@pytest.mark.parametrize("form", ["loop", "batched"])
@pytest.mark.parametrize("rows", [[1, 0, 3], [2, 2, 0]], ids=str)
def test_gradients_in_fp64(form, rows):
    x, weight = operands(rows, torch.float64, ffn=2, hidden=3)
    assert torch.autograd.gradcheck(lambda a, w: grouped_linear(a, w, rows, form), (x, weight))


def swiglu(hidden, probs, bias):
    gate, linear = (hidden if bias is None else hidden + bias).chunk(2, -1)
    return F.silu(gate) * linear * probs.unsqueeze(-1)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("form", ["loop", "batched"])
def test_rows_made_again_in_backward_in_fp64(form, with_bias):
    rows = [1, 0, 3]
    hidden, weight = operands(rows, torch.float64, ffn=2, hidden=6)
    weight = weight[..., :3].detach().requires_grad_()
    probs = torch.rand(4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn_like(hidden).requires_grad_() if with_bias else None

    def product(hidden, probs, weight, bias=None):
        return grouped_linear((hidden, probs, bias), weight, rows, form, before=swiglu)

    inputs = (hidden, probs, weight) if bias is None else (hidden, probs, weight, bias)
    assert torch.autograd.gradcheck(product, inputs)
    kept = grouped_linear(swiglu(hidden, probs, bias), weight, rows, form)
    assert torch.equal(product(*inputs), kept)


def test_rows_made_again_are_not_kept():
    kept = []
    hidden = torch.randn(4, 6, requires_grad=True)
    probs, weight = torch.rand(4), torch.randn(2, 5, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        grouped_linear((hidden, probs, None), weight, [1, 3], "loop", before=swiglu)
    assert sorted(kept) == sorted([weight.shape, hidden.shape, probs.shape])


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
@pytest.mark.parametrize("form", ["loop", "grouped_mm", "batched"])
def test_each_product_has_its_own_operands_in_fp8(form, recipe):
    rows = [40, 0, 33]
    x, weight = operands(rows, torch.bfloat16, ffn=48, hidden=64)
    emulation = Fp8Emulation(Fp8Recipe(recipe), len(rows))
    out = grouped_linear(x, weight, rows, form, emulation=emulation)
    grad = torch.randn_like(out)
    grad_x, grad_w = torch.autograd.grad(out, (x, weight), grad)
    x_q, w_q = emulation.forward(x.detach(), weight.detach(), rows)
    assert_same(out, by_expert(x_q, w_q, rows).bfloat16(), "out")
    g_q, w_q = emulation.grad_x(grad, weight.detach(), rows)
    assert_same(grad_x, by_expert(g_q, w_q.transpose(1, 2), rows).bfloat16(), "x.grad")
    g_q, x_q = emulation.grad_w(grad, x.detach(), rows)
    parts = zip(g_q.split(rows), x_q.split(rows), strict=True)
    assert_same(grad_w, torch.stack([g.T @ a for g, a in parts]).bfloat16(), "weight.grad")
    # Rounded indeed, and by no more than FP8 rounds a sum of 64.
    exact = by_expert(x.float(), weight.float(), rows)
    error = ((out.float() - exact).norm() / exact.norm()).item()
    assert 0.01 < error < 0.08


def test_auto_falls_back_where_grouped_mm_does_not_run():
    cpu, large = torch.device("cpu"), torch.empty(4, 2048, 1024, device="meta")
    rows = [64, 64, 64, 64]
    assert choose_form("auto", cpu, torch.float32, large, rows) == "grouped_mm"
    assert choose_form("auto", cpu, torch.int32, large, rows) == "loop"
    assert choose_form("loop", cpu, torch.float32, large, rows) == "loop"
    assert choose_form("batched", cpu, torch.float32, large, rows) == "batched"
    with pytest.raises(ValueError, match=r"moe_expert_gemm \(grouped_mm\) does not run on cpu"):
        choose_form("grouped_mm", cpu, torch.int32, large, rows)


def test_tf32_is_allowed_while_experts_multiply_and_nowhere_else():
    allowed = []

    def noting(of):
        def product(*operands):
            allowed.append(torch.backends.cuda.matmul.allow_tf32)
            return of(*operands)

        return product

    loop = FORMS["loop"]
    form = Form(noting(loop.forward), noting(loop.grad_x), noting(loop.grad_w))
    x, weight = operands([2, 3])
    out = grouped_linear(x, weight, [2, 3], form, tf32=True)
    assert not torch.backends.cuda.matmul.allow_tf32
    out.sum().backward()
    assert allowed == [True] * 3
    assert not torch.backends.cuda.matmul.allow_tf32
    grouped_linear(x, weight, [2, 3], form)
    assert allowed[3:] == [False]
