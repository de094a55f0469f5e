"""2:4 sparse experts: of any four consecutive inputs of a neuron, two have a weight.

Dense weights are trained. Each global batch is computed with the two of greatest magnitude in each
group of four; the gradient goes straight through to all four (STE), and those left out decay
(SR-STE), so that the choice settles. From ``sparse_freeze_iter`` on the choice stays, and the
weights left out are zero, exactly, after each step of the optimizer.

The choice is made from the weights that the model computes with (in half precision, the rounded
copy of the master weights: every data-parallel rank has all of those). Groups of four never cross
ranks, so it is the same in every layout. The end of a global batch is in ``mcore/pruning.py``.

Source: Zhou et al. 2021, Learning N:M fine-grained structured sparse neural networks from scratch.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from megatron_moe.experts.keys import whole_stack

GROUP, KEPT = 4, 2
_log = logging.getLogger(__name__)


@torch.no_grad()
def two_of_four(weight: Tensor) -> Tensor:
    """Mark the two entries of greatest magnitude in each group of four; ties go to the lower index.

    Args:
        weight: ``(..., D)``, D a multiple of 4, the contracted dimension.

    Returns:
        ``(..., D)`` bool, exactly two True in each group.

    Cost: six comparisons a group; three bytes an element.
    """
    sizes = weight.detach().abs().unflatten(-1, (-1, GROUP)).unbind(-1)
    wins = [torch.zeros_like(sizes[0], dtype=torch.int8) for _ in sizes]
    for low, high in combinations(range(GROUP), 2):
        greater = sizes[high] > sizes[low]
        wins[high] += greater
        wins[low] += ~greater
    return (torch.stack(wins, dim=-1) >= GROUP - KEPT).flatten(-2)


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight where the mask is True, zero elsewhere; the gradient goes to all of the weight."""
    return _StraightThrough.apply(weight, mask)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, mask):
        return torch.where(mask, weight, 0.0)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Sparsity:
    """Keeps the mask of one stacked weight, by the iteration.

    The mask is a buffer of the module that has the weight, so that it is saved with it. It is made
    from the weights at the first use after they changed, and always fits those that are saved.

    Args:
        moe: The plugin's options.
    """

    def __init__(self, moe: Any) -> None:
        self.start: int = moe.sparse_start_iter
        self.freeze: int = moe.sparse_freeze_iter
        self.decay: float = moe.sparse_decay
        self.permanent = False
        # Counts global batches across restarts; the layer puts its router's here.
        self.schedule: Any = None
        self._stale = True
        self._sparse = False
        _say_no_faster()

    @property
    def on(self) -> bool:
        """Whether this iteration is sparse."""
        return self.permanent or self._finished >= self.start

    @property
    def frozen(self) -> bool:
        """Whether the mask stays as it is from this iteration on."""
        return self.permanent or 0 <= self.freeze <= self._finished

    @property
    def applied(self) -> bool:
        """Whether the weight was last used with two of four, not dense."""
        return self._sparse

    def effective(self, weight: Tensor, mask: Tensor) -> Tensor:
        """What to multiply with.

        Args:
            weight: ``(e, F, D)``.
            mask: Of the same shape, bool; written to.

        Cost: a copy of the weight a use, kept for backward.
        """
        self.refresh(weight, mask)
        return masked(weight, mask) if self._sparse else weight

    @torch.no_grad()
    def refresh(self, weight: Tensor, mask: Tensor) -> None:
        """Let the mask fit the weight, if either may have changed since."""
        if not self._stale:
            return
        self._stale, self._sparse = False, self.on
        if not self._sparse:
            mask.fill_(True)
        elif not self.frozen or bool(mask.all()):  # frozen, but never made: of a dense checkpoint
            mask.copy_(two_of_four(weight))

    def weight_will_change(self) -> None:
        """The optimizer steps next."""
        self._stale = self._stale or not (self.frozen and self._sparse)

    def make_permanent(self, weight: Tensor, mask: Tensor) -> None:
        """Freeze the mask that fits the weight now, dense weights' too."""
        self.refresh(weight, mask)
        self.permanent = True
        self._stale = not self._sparse
        self.refresh(weight, mask)

    def loaded(self) -> None:
        """Weight or mask were changed from outside, by a checkpoint."""
        self._stale = True

    @property
    def _finished(self) -> int:
        return 0 if self.schedule is None else self.schedule.finished


def check_inputs(inputs: int, of: str) -> None:
    """Refuse what cannot be cut into groups of four.

    Raises:
        ValueError: ``inputs``, of this rank's slice, is no multiple of 4.
    """
    if inputs % GROUP:
        raise ValueError(
            f"sparse_experts 2:4 needs {of} ({inputs}) to be a multiple of {GROUP}: change "
            "hidden_size or moe_ffn_hidden_size / expert_tensor_parallel_size"
        )


def sparse_linears(module: Any) -> Iterator[Any]:
    """Everything in a module that has a sparse weight: ``weight``, ``mask``, ``sparsity``."""
    return (m for m in module.modules() if getattr(m, "sparsity", None) is not None)


def follow(experts: Any, schedule: Any) -> None:
    """Let sparse experts know the iteration.

    Args:
        experts: Any experts; those without sparse weights are left alone.
        schedule: Of their layer's router; ``finished`` counts global batches.
    """
    for linear in sparse_linears(experts):
        linear.sparsity.schedule = schedule


def load_mask(linear: Any, state_dict: dict, prefix: str, error_msgs: list[str]) -> None:
    """Take the mask of a sparse weight out of a state dict: ``mask0``, ``mask1``, … or ``mask``.

    One that is absent is made from the weights; one that belongs to no sparse weight is left.

    Args:
        linear: With ``weight``, ``mask`` and ``sparsity``, which may be None.
        state_dict: Changed.
        prefix: Of its keys.
        error_msgs: Added to.
    """
    name = re.compile(re.escape(prefix) + r"mask\d*")
    found = {key: state_dict.pop(key) for key in list(state_dict) if name.fullmatch(key)}
    if linear.sparsity is None:
        if found:
            _say_left()
        return
    whole = whole_stack(found, f"{prefix}mask", len(linear.mask))
    if whole is None:
        if not any(key.startswith(f"{prefix}weight") for key in state_dict):
            return  # nothing of this layer is loaded
        linear.mask.fill_(True)
    elif whole.shape != linear.mask.shape:
        error_msgs.append(
            f"size mismatch for {prefix}mask: {tuple(whole.shape)} in the checkpoint, "
            f"{tuple(linear.mask.shape)} in the model"
        )
    else:
        linear.mask.copy_(whole)
    linear.sparsity.loaded()


@torch.no_grad()
def make_permanent(model: Any) -> None:
    """Write the zeros into the expert weights and freeze their masks, whatever the iteration.

    What is saved next has exact zeros, two of four, in its weights. Master weights and moments of
    an optimizer get theirs after its next step: save without it (``--no-save-optim``).

    Args:
        model: A module, or Megatron's list of model chunks.

    Raises:
        ValueError: There are no sparse experts in it.
    """
    chunks = model if isinstance(model, list | tuple) else [model]
    linears = [linear for chunk in chunks for linear in sparse_linears(chunk)]
    if not linears:
        raise ValueError("no 2:4 sparse experts here: build it with sparse_experts 2:4")
    for linear in linears:
        linear.sparsity.make_permanent(linear.weight, linear.mask)
        linear.weight.masked_fill_(~linear.mask, 0.0)


@functools.cache
def _say_left() -> None:
    _log.warning("masks in the checkpoint are left: sparse_experts is none")


@functools.cache
def _say_no_faster() -> None:
    _log.warning("2:4 experts: masked dense product; no speed-up")
