import torch
from helpers.tolerances import assert_same
from torch.nn import functional as F

from megatron_moe.experts.activation import weighted_activation


def test_gated_halves_are_gate_then_linear():
    hidden = torch.randn(5, 6, dtype=torch.float64)
    found = weighted_activation(hidden, None, F.silu, gated=True)
    assert_same(found, F.silu(hidden[:, :3]) * hidden[:, 3:])


def test_offset_and_clamp():
    hidden = torch.tensor([[5.0, -5.0, 5.0, -5.0]])
    found = weighted_activation(hidden, None, F.relu, gated=True, linear_offset=1.0, clamp=2.0)
    assert found.tolist() == [[2.0 * 3.0, 0.0]]


def test_weights_are_applied_in_their_own_precision_and_dtype_kept():
    hidden = torch.randn(4, 3).bfloat16()
    probs = torch.rand(4)
    found = weighted_activation(hidden, probs, F.gelu, gated=False)
    expected = (F.gelu(hidden).float() * probs.unsqueeze(1)).bfloat16()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
