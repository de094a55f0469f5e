"""The forms of a grouped GEMM: ``y[r] = x[r] @ W[expert of r]ᵀ``, and its gradients.

* ``loop``: one GEMM an expert; any dtype, device and size. The reference.
* ``grouped_mm``: torch's grouped GEMM, one call for all experts.
* ``batched``: every expert padded to the rows of the fullest, one batched GEMM. Without padding,
  as with capacity-padded experts, nothing is copied.

All take rows grouped by expert, ``rows_e`` on the host, and write every row of their result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Rows = Sequence[int]


@dataclass(frozen=True, slots=True)
class Form:
    """Three products of one form.

    Args:
        forward: ``(x_RD, weight_eFD, rows_e)`` to ``(R, F)``.
        grad_x: ``(grad_RF, weight_eFD, rows_e)`` to ``(R, D)``.
        grad_w: ``(grad_RF, x_RD, rows_e)`` to ``(e, F, D)``; zero for experts without rows. None
            when it has put the gradient where it belongs.
    """

    forward: Callable[[Tensor, Tensor, Rows], Tensor]
    grad_x: Callable[[Tensor, Tensor, Rows], Tensor]
    grad_w: Callable[[Tensor, Tensor, Rows], Tensor | None]


def _loop_forward(x_RD: Tensor, weight_eFD: Tensor, rows_e: Rows) -> Tensor:
    out_RF = x_RD.new_empty(x_RD.shape[0], weight_eFD.shape[1])
    for expert, rows in slices(rows_e):
        torch.mm(x_RD[rows], weight_eFD[expert].t(), out=out_RF[rows])
    return out_RF


def _loop_grad_x(grad_RF: Tensor, weight_eFD: Tensor, rows_e: Rows) -> Tensor:
    out_RD = grad_RF.new_empty(grad_RF.shape[0], weight_eFD.shape[2])
    for expert, rows in slices(rows_e):
        torch.mm(grad_RF[rows], weight_eFD[expert], out=out_RD[rows])
    return out_RD


def _loop_grad_w(grad_RF: Tensor, x_RD: Tensor, rows_e: Rows) -> Tensor:
    out_eFD = x_RD.new_empty(len(rows_e), grad_RF.shape[1], x_RD.shape[1])
    for expert, rows in slices(rows_e):
        torch.mm(grad_RF[rows].t(), x_RD[rows], out=out_eFD[expert])
    for expert, count in enumerate(rows_e):
        if not count:
            out_eFD[expert].zero_()
    return out_eFD


def slices(rows_e: Rows) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and where they lie."""
    start = 0
    for expert, count in enumerate(rows_e):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _grouped_mm_forward(x_RD: Tensor, weight_eFD: Tensor, rows_e: Rows) -> Tensor:
    return F.grouped_mm(x_RD, weight_eFD.transpose(1, 2), offs=_ends(rows_e, x_RD))


def _grouped_mm_grad_x(grad_RF: Tensor, weight_eFD: Tensor, rows_e: Rows) -> Tensor:
    return F.grouped_mm(grad_RF, weight_eFD, offs=_ends(rows_e, grad_RF))


def _grouped_mm_grad_w(grad_RF: Tensor, x_RD: Tensor, rows_e: Rows) -> Tensor:
    return F.grouped_mm(grad_RF.t(), x_RD, offs=_ends(rows_e, x_RD))


def _ends(rows_e: Rows, like: Tensor) -> Tensor:
    ends = torch.tensor(rows_e, dtype=torch.int64).cumsum(0).to(torch.int32)
    return ends.to(like.device, non_blocking=True)


def _batched_forward(x_RD: Tensor, weight_eFD: Tensor, rows_e: Rows) -> Tensor:
    return _packed(torch.bmm(_padded(x_RD, rows_e), weight_eFD.transpose(1, 2)), rows_e)


def _batched_grad_x(grad_RF: Tensor, weight_eFD: Tensor, rows_e: Rows) -> Tensor:
    return _packed(torch.bmm(_padded(grad_RF, rows_e), weight_eFD), rows_e)


def _batched_grad_w(grad_RF: Tensor, x_RD: Tensor, rows_e: Rows) -> Tensor:
    return torch.bmm(_padded(grad_RF, rows_e).transpose(1, 2), _padded(x_RD, rows_e))


def _padded(x_RD: Tensor, rows_e: Rows) -> Tensor:
    """``(e, most, D)``: each expert's rows, then zeros."""
    most = max(rows_e)
    shape = (len(rows_e), most, x_RD.shape[1])
    if most * len(rows_e) == x_RD.shape[0]:
        return x_RD.reshape(shape)
    out_erD = x_RD.new_empty(shape)
    for expert, part in enumerate(x_RD.split(list(rows_e))):
        out_erD[expert, : len(part)] = part
        out_erD[expert, len(part) :] = 0
    return out_erD


def _packed(y_erD: Tensor, rows_e: Rows) -> Tensor:
    """The rows again, without the padding."""
    if y_erD.shape[1] * len(rows_e) == sum(rows_e):
        return y_erD.flatten(0, 1)
    return torch.cat([y[:count] for y, count in zip(y_erD, rows_e, strict=True)])


FORMS = {
    "loop": Form(_loop_forward, _loop_grad_x, _loop_grad_w),
    "grouped_mm": Form(_grouped_mm_forward, _grouped_mm_grad_x, _grouped_mm_grad_w),
    "batched": Form(_batched_forward, _batched_grad_x, _batched_grad_w),
}


def fitting(form: str | Form, x: Tensor, weight_eFD: Tensor) -> Form:
    """The form, or ``loop`` for what it cannot take.

    ``grouped_mm`` wants rows in steps of 16 bytes, and more than one row and expert: the stride
    of a dimension of size 1 may be anything. No other takes no rows at all.
    """
    if isinstance(form, Form):
        return form
    odd = any(n * x.element_size() % 16 for n in weight_eFD.shape[1:])
    small = x.shape[0] <= 1 or weight_eFD.shape[0] == 1
    if x.shape[0] == 0 or (form == "grouped_mm" and (odd or small)):
        return FORMS["loop"]
    return FORMS[form]
