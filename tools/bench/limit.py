"""What no layer can avoid: its matrix products and its activation, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.tools.bench.shapes import NUM_TOKENS, Shape

_aten = torch.ops.aten


def matmul_limit(
    shape: Shape, dtype: torch.dtype, rows_e: list[int], *, gated: bool
) -> Callable[[], None]:
    """One step's arithmetic on data that lies where it is needed.

    Three products of the gate (in fp32, as in the layers), six an expert for the rows that the
    router gave it in this run, the activation and its derivative. Results are written over old
    ones; nothing is routed, moved, weighed or recorded for autograd.
    """
    torch.manual_seed(3)
    gate = _Product(
        torch.randn(NUM_TOKENS, shape.hidden), torch.randn(shape.num_experts, shape.hidden)
    )
    experts = experts_limit(shape.hidden, shape.ffn, rows_e, dtype, gated=gated)

    def step() -> None:
        gate.forward()
        experts()
        gate.backward()

    return step


def experts_limit(
    hidden: int,
    ffn: int,
    rows_e: list[int],
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    gated: bool,
) -> Callable[[], None]:
    """The experts' part of it: six products an expert, the activation and its derivative."""
    kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
    copies, halves = sum(rows_e), 2 if gated else 1
    fc1 = [torch.randn(halves * ffn, hidden, **kwargs) for _ in rows_e]
    fc2 = [torch.randn(hidden, ffn, **kwargs) for _ in rows_e]
    x = torch.randn(copies, hidden, **kwargs).split(rows_e)
    act_RF = torch.randn(copies, ffn, **kwargs)
    first = [_Product(x_rD, w) for x_rD, w in zip(x, fc1, strict=True)]
    second = [_Product(a_rF, w) for a_rF, w in zip(act_RF.split(rows_e), fc2, strict=True)]
    activate = (_gated if gated else _plain)(copies, ffn, kwargs)

    def step() -> None:
        for product in first:
            product.forward()
        activate()
        for product in second:
            product.forward()
        for product in (*second, *first):
            product.backward()

    return step


class _Product:
    """``y = x @ wᵀ`` and both gradients, into place."""

    def __init__(self, x_RD: Tensor, w_FD: Tensor) -> None:
        self.x, self.w = x_RD, w_FD
        self.y = x_RD.new_empty(x_RD.shape[0], w_FD.shape[0]).normal_()
        self.grad_y = torch.randn_like(self.y)
        self.grad_x, self.grad_w = torch.empty_like(x_RD), torch.empty_like(w_FD)

    def forward(self) -> None:
        torch.mm(self.x, self.w.t(), out=self.y)

    def backward(self) -> None:
        torch.mm(self.grad_y, self.w, out=self.grad_x)
        torch.mm(self.grad_y.t(), self.x, out=self.grad_w)


def _plain(copies: int, ffn: int, kwargs: dict[str, Any]) -> Callable[[], None]:
    h, grad = torch.randn(copies, ffn, **kwargs), torch.randn(copies, ffn, **kwargs)
    out, grad_h = torch.empty_like(h), torch.empty_like(h)

    def activate() -> None:
        _aten.gelu.out(h, out=out)
        _aten.gelu_backward.grad_input(grad, h, grad_input=grad_h)

    return activate


def _gated(copies: int, ffn: int, kwargs: dict[str, Any]) -> Callable[[], None]:
    h, grad = torch.randn(copies, 2 * ffn, **kwargs), torch.randn(copies, ffn, **kwargs)
    gate, linear = h.chunk(2, dim=-1)

    def activate() -> None:
        act = F.silu(gate)
        act * linear
        _aten.silu_backward(grad * linear, gate)
        grad * act

    return activate
