"""How close two results must be, by dtype: the one place that says so.

The numbers are for sums of up to a few thousand terms of order 1 taken in another order. A
comparison that needs more room has a bug, or says at the call why it needs it.
"""

from typing import Any

import torch
from torch import Tensor

TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
}

# Two training runs in half precision: rounding differs between layouts, and with it every sum, so
# the fp32 limits of what is logged become 2e-2, absolute 2e-3.
HALF_RUN = 1000.0


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Return ``rtol`` and ``atol`` for :func:`torch.testing.assert_close`."""
    return TOLERANCES[dtype] if dtype.is_floating_point else {"rtol": 0.0, "atol": 0.0}


def assert_same(found: Any, expected: Any, what: str = "value", scale: float = 1.0) -> None:
    """Compare tensors, numbers, or mappings of them, naming the first one that differs.

    Args:
        found: What was computed; Python numbers are compared as fp32 results.
        expected: What it must equal; the same structure, and dtypes.
        what: The name used in the message.
        scale: Multiplies the tolerance; give the reason at the call.

    Raises:
        AssertionError: With name, largest difference and its coordinate.
    """
    if isinstance(expected, dict):
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected)
        assert not missing and not extra, f"{what}: missing {missing}, unexpected {extra}"
        for name in expected:
            assert_same(found[name], expected[name], f"{what}[{name}]", scale)
        return
    found, expected = _as_tensor(found), _as_tensor(expected)
    limits = {name: value * scale for name, value in tolerance(expected.dtype).items()}
    torch.testing.assert_close(found, expected, **limits, msg=lambda text: f"{what}: {text}")


def _as_tensor(value: Tensor | float) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)
