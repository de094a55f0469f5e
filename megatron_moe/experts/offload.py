"""Experts whose weights lie in files, and are on the device only while they are used.

Weights stay ordinary parameters of Megatron's; their memory is a file (see
:mod:`megatron_moe.experts.placement`), so checkpoints, optimizers and collectives know nothing of
it. What computes gets one expert's matrix at a time from a cache of a few experts, filled ahead of
use. The arithmetic is the ``loop`` form's: training is the same bit for bit.

With ``offload_optimizer`` gradients and optimizer state lie in files too. Megatron has no slot for
where they are made: see ``patches/megatron/place_offloaded.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_moe.experts.expert_cache import ExpertCache, empty_aligned
from megatron_moe.experts.forms import FORMS, Form, Rows, slices
from megatron_moe.experts.grouped_gemm import grouped_linear
from megatron_moe.experts.placement import FileStore, is_placed

if TYPE_CHECKING:
    from megatron_moe.config import MoEConfig
    from megatron_moe.experts.stacked import StackedLinear

_LIVE: weakref.WeakSet[ExpertOffload] = weakref.WeakSet()
_SHARED: weakref.WeakValueDictionary[tuple, ExpertOffload] = weakref.WeakValueDictionary()
_AHEAD = 2  # linear layers: the other one of these experts, whose rows are known, and one more


@dataclass
class _Layer:
    """The linear layers of one MoE layer's experts, and the rows of its last micro-batch."""

    linears: list[weakref.ref[StackedLinear]]
    rows_e: list[int] = field(default_factory=list)

    def busiest(self) -> list[int]:
        """Experts that had rows, most rows first."""
        with_rows = [expert for expert, rows in enumerate(self.rows_e) if rows]
        return sorted(with_rows, key=lambda expert: -self.rows_e[expert])


class ExpertOffload:
    """Where a rank's experts lie, and the few that are on the device; one for all layers.

    Args:
        folder: Of the files.
        num_cached: Experts on the device at a time, M: all their matrices.
        training_state: Whether gradients and optimizer state lie in files too.
        prefetch: Whether matrices are copied ahead of use.

    Raises:
        ValueError: The folder is missing, or no file can be made in it.
    """

    def __init__(
        self,
        folder: Path,
        num_cached: int,
        *,
        training_state: bool = False,
        prefetch: bool = True,
    ) -> None:
        self.store = FileStore(folder, training_state=training_state)
        self.num_cached = num_cached
        self.cache = ExpertCache(prefetch=prefetch)
        self.hit_rate = 0.0  # share of the last global batch's questions that found a copy
        self._seen = (0, 0)
        self._order: list[tuple[_Layer, int]] = []  # linear layers in the order of their use
        self._place: weakref.WeakKeyDictionary[StackedLinear, int] = weakref.WeakKeyDictionary()
        _LIVE.add(self)

    @classmethod
    def shared(cls, moe: MoEConfig) -> ExpertOffload | None:
        """The one for these options in this process, while a model has it; None without offload."""
        if moe.expert_offload == "none":
            return None
        options = (moe.offload_dir, moe.offload_cache, moe.offload_optimizer)
        found = _SHARED.get(options)
        if found is None:
            found = cls(
                Path(moe.offload_dir), moe.offload_cache, training_state=moe.offload_optimizer
            )
            _SHARED[options] = found
        return found

    def add_layer(self, *linears: StackedLinear) -> None:
        """Take the linear layers of one layer's experts on, in the order of their use."""
        layer = _Layer([weakref.ref(linear) for linear in linears])
        for j, linear in enumerate(linears):
            self._place[linear] = len(self._order)
            self._order.append((layer, j))
        one = sum(linear.weight[0].nbytes for linear in linears)
        self.cache.capacity = max(self.cache.capacity, self.num_cached * one)

    def product(
        self,
        linear: StackedLinear,
        x: Tensor | tuple[Tensor | None, ...],
        rows_e: Sequence[int],
        before: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """As ``StackedLinear.forward``, with one expert's weight after the other from the cache.

        Raises:
            ValueError: The weight has left its file.

        Cost: copies of the experts that have rows and are not in the cache. The gradient of the
            weight is added to Megatron's ``main_grad`` expert by expert; only without one is it
            made for all experts at once.
        """
        if not is_placed(linear.weight):
            raise ValueError(
                "expert_offload = 'file', but a weight has left its file: Megatron's buffers are "
                "placed by patches, so call megatron_moe.activate.activate before DDP is built, "
                "or use megatron-moe run; or drop --moe-expert-offload"
            )
        form = Form(
            partial(self._forward, self._place[linear]),
            partial(self._grad_x, self._place[linear]),
            partial(_grad_w, linear.weight),
        )
        return grouped_linear(x, linear.weight, rows_e, form, before=before)

    def end_batch(self) -> None:
        """Weights are about to change: forget all copies, and copy nothing before the next use."""
        self.cache.invalidate()
        counts = self.cache.counts
        hits, misses = counts.hits - self._seen[0], counts.misses - self._seen[1]
        self._seen = counts.hits, counts.misses
        if hits + misses:  # not when the optimizer says once more that weights will change
            self.hit_rate = hits / (hits + misses)

    def summary(self) -> dict[str, int]:
        """What the cache did since the start."""
        return self.cache.summary()

    def _forward(self, place: int, x_RD: Tensor, weight_eFD: Tensor, rows_e: Rows) -> Tensor:
        self._order[place][0].rows_e = list(rows_e)
        parts = list(slices(rows_e))
        keys = self._announce(place, [expert for expert, _ in parts], +1)
        out_RF = x_RD.new_empty(x_RD.shape[0], weight_eFD.shape[1])
        for (_, rows), key in zip(parts, keys, strict=True):
            torch.mm(x_RD[rows], self.cache.fetch(*key).t(), out=out_RF[rows])
        return out_RF

    def _grad_x(self, place: int, grad_RF: Tensor, weight_eFD: Tensor, rows_e: Rows) -> Tensor:
        parts = list(slices(rows_e))[::-1]  # backwards: what was used last is still there
        keys = self._announce(place, [expert for expert, _ in parts], -1)
        out_RD = grad_RF.new_empty(grad_RF.shape[0], weight_eFD.shape[2])
        for (_, rows), key in zip(parts, keys, strict=True):
            torch.mm(grad_RF[rows], self.cache.fetch(*key), out=out_RD[rows])
        return out_RD

    def _announce(self, place: int, experts: list[int], step: int) -> list[tuple[Any, Any]]:
        """Plan these experts, then the busiest of the layers that come; return the keys of these.

        Args:
            place: Of the linear layer that runs now.
            experts: That have rows, in the order of their use.
            step: +1 in forward, -1 in backward.
        """
        now = list(self._keys(place, experts))
        coming = list(now)
        for ahead in range(1, _AHEAD + 1):
            if 0 <= (there := place + step * ahead) < len(self._order):
                coming += self._keys(there, self._order[there][0].busiest())
        self.cache.plan(coming)
        return now

    def _keys(self, place: int, experts: list[int]) -> Iterator[tuple[Any, Callable[[], Tensor]]]:
        layer, j = self._order[place]
        linear = layer.linears[j]()
        if linear is None:  # its model is gone
            return
        weight = linear.weight.detach()
        for expert in experts:
            # A weight that torch changed in place is another one. Megatron changes them through
            # `.data`, which torch does not count: then `end_batch` has been called.
            yield (place, expert, linear.weight._version), partial(torch.select, weight, 0, expert)


def _grad_w(weight: Tensor, grad_RF: Tensor, x_RD: Tensor, rows_e: Rows) -> Tensor | None:
    """Add each expert's gradient to ``main_grad``, which Megatron's DDP would do for all at once.

    Experts without rows are left alone: Megatron would add zeros. Nothing is left for autograd to
    accumulate, so Megatron's own hook finds no gradient and adds nothing.
    """
    if not weight.requires_grad:
        return None
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return FORMS["loop"].grad_w(grad_RF, x_RD, rows_e)
    shape, device = weight.shape[1:], weight.device
    for expert, rows in slices(rows_e):
        offset = expert * shape.numel() * x_RD.dtype.itemsize  # as in a stack of all experts
        one_FD = empty_aligned(shape, x_RD.dtype, offset, device)
        torch.mm(grad_RF[rows].t(), x_RD[rows], out=one_FD)
        main_grad[expert].add_(one_FD.to(weight.dtype))
    return None


def live() -> list[ExpertOffload]:
    """Those that some model of this process has."""
    return list(_LIVE)


def end_batch() -> None:
    """Weights are about to change: every cache forgets its copies."""
    for offload in live():
        offload.end_batch()
