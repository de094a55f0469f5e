"""Delayed scaling's memory: scales made of what past global batches saw, saved with the experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from megatron_moe.buffers import ExactBuffers
from megatron_moe.experts.fp8_quantise import FP8_MAX, amax_over
from megatron_moe.experts.keys import whole_stack

if TYPE_CHECKING:
    from megatron_moe.experts.fp8 import Fp8Recipe

_FP32_MAX = torch.finfo(torch.float32).max
Slot = Literal["x", "weight", "grad"]
_SLOTS: dict[Slot, int] = {"x": 0, "weight": 1, "grad": 2}  # places in the buffers


class DelayedScales(ExactBuffers, torch.nn.Module):
    """Delayed scaling's memory: what each expert's x, weight and gradient were in past batches.

    Operands are quantised with ``scale``, made of amaxes of earlier global batches; the amax of
    the present one is gathered in ``seen`` and used at its end.

    TE steps after every micro-batch; this steps once a global batch, on purpose. A scale is then
    the same in all micro-batches and in every recomputation, so that results do not depend on
    the layout, on the micro-batch size or on accumulation. With one micro-batch a batch, the
    numbers are TE's.

    Attributes:
        amax_history: ``(e, 3, H)`` fp32, in TE's order: place 0 is the present batch (zero here,
            see ``seen``), place 1 the oldest, the last place the newest. 3: x, weight, gradient.
        scale: ``(e, 3)`` fp32, 1 at first as TE's.
        seen: ``(e, 3)`` fp32, not saved: the largest amax of this global batch so far.
    """

    amax_history: Tensor
    scale: Tensor
    seen: Tensor

    def __init__(self, recipe: Fp8Recipe, num_local_experts: int, device: Any = None) -> None:
        super().__init__()
        self.recipe = recipe
        shape, options = (num_local_experts, 3), {"dtype": torch.float32, "device": device}
        history = torch.zeros(*shape, recipe.amax_history_len, **options)
        # Saved by the layer that has them, one record an expert; see `kept`.
        self.register_buffer("amax_history", history, persistent=False)
        self.register_buffer("scale", torch.ones(shape, **options), persistent=False)
        self.register_buffer("seen", torch.zeros(shape, **options), persistent=False)

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, by name; each with a leading axis of experts."""
        return {"fp8_scale": self.scale, "fp8_amax_history": self.amax_history}

    @torch.no_grad()
    def record(self, slot: Slot, amax_e: Tensor) -> None:
        """Remember the amaxes of a tensor, if training. Recording a tensor twice changes nothing.

        Args:
            slot: Which operand it is.
            amax_e: ``(e,)`` fp32.
        """
        if self.training:
            seen_e = self.seen[:, _SLOTS[slot]]
            seen_e.copy_(torch.maximum(seen_e, amax_e))

    def scale_of(self, slot: Slot) -> Tensor:
        """Return the scales ``(e,)`` fp32 that quantise an operand in this batch."""
        return self.scale[:, _SLOTS[slot]]

    @torch.no_grad()
    def end_batch(self, group_reduce: Callable[[Tensor], object] | None = None) -> None:
        """Put what this global batch saw into the history, and make the next batch's scales.

        TE's rules: an operand of which nothing but zeros was seen keeps history and scale; an
        infinite amax enters the history and leaves the scale as it was; a scale that would
        overflow is the largest finite fp32.

        Args:
            group_reduce: Reduces a ``(e, 3)`` fp32 tensor in place to its maximum over the ranks
                that hold the same experts. None where there is one such rank.

        Cost: the collective of ``group_reduce``.
        """
        if group_reduce is not None:
            group_reduce(self.seen)
        window = torch.cat((self.amax_history[..., 1:], self.seen.unsqueeze(-1)), dim=-1)
        newest = self.recipe.amax_compute_algo == "most_recent"
        amax = self.seen if newest else amax_over(window, (-1,))
        largest = [FP8_MAX[self.recipe.dtype_of(slot)] for slot in _SLOTS]
        scaled = (
            torch.tensor(largest, dtype=amax.dtype, device=amax.device) * 2.0**-self.recipe.margin
        )
        moves = self.seen != 0
        usable = moves & amax.isfinite() & (amax > 0)
        scale = (scaled.expand_as(amax) / amax).clamp_(max=_FP32_MAX)
        self.scale.copy_(torch.where(usable, scale, self.scale))
        window[..., 0] = 0  # the oldest has served, and its place is the present batch's
        self.amax_history.copy_(torch.where(moves.unsqueeze(-1), window, self.amax_history))
        self.seen.zero_()


def end_delayed_batch(stages: list[Any], reduce_max: Callable[[Tensor], object]) -> None:
    """Step the delayed scales of all layers at the end of a global batch, after one reduction.

    Args:
        stages: :class:`DelayedScales` of the layers, in the same order on all ranks.
        reduce_max: Reduces a tensor in place over the ranks that hold the same experts.

    Cost: one reduction of 3 numbers for each expert's linear layer.
    """
    if not stages:
        return
    seen = torch.cat([scales.seen.flatten() for scales in stages])
    reduce_max(seen)
    for scales, part in zip(stages, seen.split([s.seen.numel() for s in stages]), strict=True):
        scales.seen.copy_(part.view_as(scales.seen))
        scales.end_batch()


def load_scales(
    scales: DelayedScales | None, state_dict: dict, prefix: str, error_msgs: list[str]
) -> None:
    """Take what delayed scaling remembers out of a state dict, stacked or one entry an expert.

    State that is absent leaves scaling at its start; state that nobody asks for is left.

    Args:
        scales: None where nothing is scaled so.
        state_dict: Changed.
        prefix: Of its keys.
        error_msgs: Added to.
    """
    found = {k: state_dict.pop(k) for k in list(state_dict) if k.startswith(f"{prefix}fp8_")}
    for name, target in {} if scales is None else scales.kept().items():
        whole = whole_stack(found, f"{prefix}{name}", len(target))
        if whole is None:
            continue
        if whole.shape != target.shape:
            error_msgs.append(
                f"size mismatch for {prefix}{name}: {tuple(whole.shape)} in the checkpoint, "
                f"{tuple(target.shape)} in the model; --fp8-amax-history-len must be what it was"
            )
        else:
            target.copy_(whole)
