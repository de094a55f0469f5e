"""``y[r] = x[r] @ W[expert of r]ᵀ`` for rows grouped by expert, differentiable.

One autograd function around the forms of :mod:`megatron_moe.experts.forms`. Indexing a stacked
weight per expert under plain autograd would build an (e, F, D) gradient for each expert, O(e²);
here the weight gradient is written once. Experts without rows get a zero gradient, never None.

Source: measured against batched and padded forms, see tools/bench/RESULTS.md.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_moe.experts.form_table import fastest
from megatron_moe.experts.forms import FORMS, Form, Rows, fitting

logger = logging.getLogger(__name__)


class Emulation(Protocol):
    """Operands of the three products in another precision, given back as fp32."""

    def forward(self, x_RD: Tensor, weight_eFD: Tensor, rows_e: list[int]) -> tuple[Tensor, Tensor]:
        """Contracted over D."""

    def grad_x(
        self, grad_RF: Tensor, weight_eFD: Tensor, rows_e: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Contracted over F."""

    def grad_w(self, grad_RF: Tensor, x_RD: Tensor, rows_e: list[int]) -> tuple[Tensor, Tensor]:
        """Contracted over the rows of each expert."""


def grouped_linear(
    x: Tensor | tuple[Tensor | None, ...],
    weight_eFD: Tensor,
    rows_e: Sequence[int],
    form: str | Form,
    *,
    before: Callable[..., Tensor] | None = None,
    emulation: Emulation | None = None,
    tf32: bool = False,
) -> Tensor:
    """Multiply each expert's rows by its weight.

    Args:
        x: Rows grouped by expert, ``(R, D)``; R may be 0. With ``before``, its arguments.
        weight_eFD: Stacked weights, ``(e, F, D)``.
        rows_e: Rows of each expert; sums to R; entries may be 0.
        form: A key of ``FORMS``, from :func:`choose_form`, or a form itself.
        before: Makes the rows; they are made again in backward instead of being kept.
        emulation: Another precision for the operands; then the products are computed in fp32.
        tf32: Let a GPU round fp32 operands to TF32 (10 bits); here alone, the router stays exact.

    Returns:
        ``(R, F)`` in the dtype of the rows.
    """
    inputs = x if isinstance(x, tuple) else (x,)
    how = _How(list(rows_e), form, before, emulation, tf32)
    return _GroupedLinear.apply(how, weight_eFD, *inputs)


@dataclass(frozen=True, slots=True)
class _How:
    rows_e: list[int]
    form: str | Form
    before: Callable[..., Tensor] | None
    emulation: Emulation | None
    tf32: bool


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, how, weight_eFD, *inputs):
        ctx.save_for_backward(weight_eFD, *inputs)
        ctx.how = how
        x_RD = inputs[0] if how.before is None else how.before(*inputs)
        x, weight = x_RD, weight_eFD
        if how.emulation is not None:
            x, weight = how.emulation.forward(x_RD, weight_eFD, how.rows_e)
        with _multiplying_in(how.tf32):
            return fitting(how.form, x, weight).forward(x, weight, how.rows_e).to(x_RD.dtype)

    @staticmethod
    def backward(ctx, grad_RF):
        weight_eFD, *inputs = ctx.saved_tensors
        # A gradient with stride 0 (the gradient of a sum) is refused by grouped_mm.
        grad_RF = grad_RF.contiguous()
        if ctx.how.before is None:
            grad_x, grad_w = _gradients(ctx.how, grad_RF, inputs[0], weight_eFD)
            return None, grad_w, grad_x
        with torch.enable_grad():
            inputs = [
                t if t is None else t.detach().requires_grad_(t.requires_grad) for t in inputs
            ]
            x_RD = ctx.how.before(*inputs)
        grad_x, grad_w = _gradients(ctx.how, grad_RF, x_RD.detach(), weight_eFD)
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(x_RD, wanted, grad_x) if wanted else ())
        grads = [next(found) if t is not None and t.requires_grad else None for t in inputs]
        return None, grad_w, *grads


def _gradients(
    how: _How, grad_RF: Tensor, x_RD: Tensor, weight_eFD: Tensor
) -> tuple[Tensor, Tensor | None]:
    grad, weight, grad_for_w, x = grad_RF, weight_eFD, grad_RF, x_RD
    if how.emulation is not None:
        grad, weight = how.emulation.grad_x(grad_RF, weight_eFD, how.rows_e)
        grad_for_w, x = how.emulation.grad_w(grad_RF, x_RD, how.rows_e)
    form = fitting(how.form, grad, weight)
    with _multiplying_in(how.tf32):
        grad_x = form.grad_x(grad, weight, how.rows_e).to(x_RD.dtype)
        grad_w = form.grad_w(grad_for_w, x, how.rows_e)
    return grad_x, None if grad_w is None else grad_w.to(weight_eFD.dtype)


@contextmanager
def _multiplying_in(tf32: bool) -> Iterator[None]:
    """Let fp32 matrices be multiplied in TF32, if asked for; what else runs is left as it was."""
    if not tf32:
        yield
        return
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = kept


def choose_form(
    wish: str, device: torch.device, dtype: torch.dtype, weight_eFD: Tensor, rows_e: Rows
) -> str:
    """Resolve ``auto`` by what runs here and by the measured table; said once in the log.

    It depends on what is multiplied alone, never on a clock: runs stay reproducible.

    Raises:
        ValueError: ``grouped_mm`` was asked for and does not run here.
    """
    if wish in ("loop", "batched"):
        return wish
    reason = _why_not_grouped_mm(device.type, dtype)
    if wish == "grouped_mm":
        if reason is None:
            return wish
        raise ValueError(
            f"moe_expert_gemm (grouped_mm) does not run on {device.type} in {dtype}: {reason}; "
            "use auto, loop or batched"
        )
    form, why = fastest(device.type, dtype, weight_eFD[0].numel(), rows_e)
    if form == "grouped_mm" and reason is not None:
        form, why = "loop", f"grouped_mm does not run: {reason}"
    _say(form, device.type, dtype, why)
    return form


@functools.cache
def _say(form: str, device_type: str, dtype: torch.dtype, why: str) -> None:
    logger.info("expert GEMM on %s in %s: %s (%s)", device_type, dtype, form, why)


@functools.cache
def _why_not_grouped_mm(device_type: str, dtype: torch.dtype) -> str | None:
    form = FORMS["grouped_mm"]
    try:  # forward and both gradients of two experts, one without rows
        x = torch.ones(16, 16, device=device_type, dtype=dtype)
        w = torch.ones(2, 16, 16, device=device_type, dtype=dtype)
        form.forward(x, w, [16, 0])
        form.grad_x(x, w, [16, 0])
        form.grad_w(x, x, [16, 0])
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return None
