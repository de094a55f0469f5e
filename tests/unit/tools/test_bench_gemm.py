import pytest
import torch
from helpers.tolerances import assert_same

from megatron_moe.tools.bench.gemm import forms


@pytest.mark.parametrize("name", forms())
def test_every_form_computes_the_same(name):
    rows_e = [3, 0, 5]
    x = torch.randn(8, 8, requires_grad=True)
    weight = torch.randn(3, 4, 8, requires_grad=True)
    grad = torch.randn(8, 4)
    expected = torch.einsum("rd,rfd->rf", x, weight.repeat_interleave(torch.tensor(rows_e), dim=0))
    found = forms()[name](x, weight, rows_e)
    assert_same(found, expected)
    pairs = (torch.autograd.grad(y, (x, weight), grad) for y in (found, expected))
    for one, other in zip(*pairs, strict=True):
        assert_same(one, other)
