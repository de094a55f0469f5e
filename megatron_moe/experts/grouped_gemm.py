"""``y[r] = x[r] @ W[expert of r]ᵀ`` for rows grouped by expert.

One autograd function around two forms: torch's ``grouped_mm`` where it runs, and a loop of one
GEMM an expert, which takes any dtype and device. Indexing a stacked weight per expert under plain
autograd would build an (e, F, D) gradient for each expert, O(e²); here the weight gradient is
written once. Experts without rows get a zero gradient, never None.

Source: measured against batched and padded forms, see tools/bench/RESULTS.md.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)


def grouped_linear(x_RD: Tensor, weight_eFD: Tensor, rows_e: Sequence[int], form: str) -> Tensor:
    """Multiply each expert's rows by its weight.

    Args:
        x_RD: Rows grouped by expert, ``(R, D)``; R may be 0.
        weight_eFD: Stacked weights, ``(e, F, D)``.
        rows_e: Rows of each expert; sums to R; entries may be 0.
        form: ``grouped_mm`` or ``loop``, from :func:`choose_form`.

    Returns:
        ``(R, F)``.
    """
    return _GroupedLinear.apply(x_RD, weight_eFD, list(rows_e), form)


def choose_form(wish: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve ``auto`` for a device and dtype, by trying; said once in the log.

    Raises:
        ValueError: ``grouped_mm`` was asked for and does not run here.
    """
    if wish == "loop":
        return "loop"
    reason = _why_not_grouped_mm(device.type, dtype)
    if reason is None:
        return "grouped_mm"
    if wish == "grouped_mm":
        raise ValueError(
            f"moe_expert_gemm (grouped_mm) does not run on {device.type} in {dtype}: {reason}; "
            "use auto or loop"
        )
    return "loop"


@functools.cache
def _why_not_grouped_mm(device_type: str, dtype: torch.dtype) -> str | None:
    reason = None
    try:  # forward and both gradients of two experts, one without rows
        x = torch.ones(16, 16, device=device_type, dtype=dtype)
        w = torch.ones(2, 16, 16, device=device_type, dtype=dtype)
        _grouped_mm_forward(x, w, [16, 0])
        _grouped_mm_backward(x, x, w, [16, 0])
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
    chosen = "grouped_mm" if reason is None else f"loop (grouped_mm does not run: {reason})"
    logger.info("expert GEMM on %s in %s: %s", device_type, dtype, chosen)
    return reason


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, weight_eFD, rows_e, form):
        ctx.save_for_backward(x_RD, weight_eFD)
        ctx.rows_e, ctx.form = rows_e, form
        return _FORWARD[_form_for(form, x_RD, weight_eFD)](x_RD, weight_eFD, rows_e)

    @staticmethod
    def backward(ctx, grad_RF):
        x_RD, weight_eFD = ctx.saved_tensors
        # A gradient with stride 0 (the gradient of a sum) is refused by grouped_mm.
        grad_RF = grad_RF.contiguous()
        form = _form_for(ctx.form, x_RD, weight_eFD)
        grad_x, grad_w = _BACKWARD[form](grad_RF, x_RD, weight_eFD, ctx.rows_e)
        return grad_x, grad_w, None, None


def _form_for(form: str, x_RD: Tensor, weight_eFD: Tensor) -> str:
    """``loop`` for what ``grouped_mm`` cannot take: no rows, or rows not in steps of 16 bytes.

    Nor one row, nor one expert: the stride of a dimension of size 1 may be anything.
    """
    odd = any(n * x_RD.element_size() % 16 for n in weight_eFD.shape[1:])
    if x_RD.shape[0] <= 1 or weight_eFD.shape[0] == 1 or odd:
        return "loop"
    return form


def _grouped_mm_forward(x_RD: Tensor, weight_eFD: Tensor, rows_e: list[int]) -> Tensor:
    return F.grouped_mm(x_RD, weight_eFD.transpose(1, 2), offs=_ends(rows_e, x_RD))


def _grouped_mm_backward(
    grad_RF: Tensor, x_RD: Tensor, weight_eFD: Tensor, rows_e: list[int]
) -> tuple[Tensor, Tensor]:
    ends = _ends(rows_e, x_RD)
    grad_x = F.grouped_mm(grad_RF, weight_eFD, offs=ends)
    grad_w = F.grouped_mm(grad_RF.t(), x_RD, offs=ends)
    return grad_x, grad_w


def _ends(rows_e: list[int], like: Tensor) -> Tensor:
    ends = torch.tensor(rows_e, dtype=torch.int64).cumsum(0).to(torch.int32)
    return ends.to(like.device, non_blocking=True)


def _loop_forward(x_RD: Tensor, weight_eFD: Tensor, rows_e: list[int]) -> Tensor:
    out_RF = x_RD.new_empty(x_RD.shape[0], weight_eFD.shape[1])
    for expert, rows in _slices(rows_e):
        torch.mm(x_RD[rows], weight_eFD[expert].t(), out=out_RF[rows])
    return out_RF


def _loop_backward(
    grad_RF: Tensor, x_RD: Tensor, weight_eFD: Tensor, rows_e: list[int]
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x_RD)
    grad_w = torch.zeros_like(weight_eFD) if 0 in rows_e else torch.empty_like(weight_eFD)
    for expert, rows in _slices(rows_e):
        torch.mm(grad_RF[rows], weight_eFD[expert], out=grad_x[rows])
        torch.mm(grad_RF[rows].t(), x_RD[rows], out=grad_w[expert])
    return grad_x, grad_w


def _slices(rows_e: list[int]) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, rows in enumerate(rows_e):
        if rows:
            yield expert, slice(start, start + rows)
        start += rows


_FORWARD = {"grouped_mm": _grouped_mm_forward, "loop": _loop_forward}
_BACKWARD = {"grouped_mm": _grouped_mm_backward, "loop": _loop_backward}
