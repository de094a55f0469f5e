"""The weight of a row, computed in blocks where dtypes differ."""

import pytest
import torch
from torch.nn import functional as F

from megatron_moe.experts.activation import weighted_activation

DTYPES = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float32),
]


@pytest.mark.parametrize(("dtype", "probs_dtype"), DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 5000])
def test_value_and_gradients_are_those_of_one_product(dtype, probs_dtype, num_rows):
    hidden = torch.randn(num_rows, 96).to(dtype).requires_grad_()
    probs = torch.rand(num_rows).to(probs_dtype).requires_grad_()
    grad = torch.randn(num_rows, 96).to(dtype)

    found = weighted_activation(hidden, probs, F.gelu, gated=False)
    found_grads = torch.autograd.grad(found, (hidden, probs), grad)
    expected = (F.gelu(hidden) * probs.unsqueeze(-1)).to(dtype)
    expected_grads = torch.autograd.grad(expected, (hidden, probs), grad)

    assert found.dtype == dtype
    assert torch.equal(found, expected)
    for one, other in zip(found_grads, expected_grads, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
