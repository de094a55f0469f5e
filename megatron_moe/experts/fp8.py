"""What an FP8 recipe does to the operands of the experts' matrix products, on any device.

Transformer Engine (TE) rounds both operands of each of the three products of a linear layer to
FP8 and multiplies the codes. Here the operands are rounded by the same formulas
(``experts/fp8_quantise.py``) and handed back as fp32, for a product in fp32: what the numbers lose
is what they would lose on the hardware, and the product is rounded to the dtype of the rows. What
is not imitated: the order in which a tensor core adds, and the width of its accumulator.

===========  ==============================================  ===================  =============
recipe       one scale for                                   scale                format
===========  ==============================================  ===================  =============
tensorwise   an expert's x, weight or gradient               fp32, of this amax   hybrid
delayed      the same                                        fp32, of past amax   hybrid
blockwise    1x128 of x and gradient along the contraction,  power of two         e4m3
             128x128 of a weight
mxfp8        1x32 of everything along the contraction        power of two (E8M0)  e4m3
===========  ==============================================  ===================  =============

*Hybrid* keeps gradients in e5m2, which has more range and less precision. For the weight's
gradient the contraction runs over each expert's rows, and blocks start at its first row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from megatron_moe.experts.fp8_delayed import DelayedScales, Slot
from megatron_moe.experts.fp8_quantise import (
    Scaling,
    amax_of_experts,
    dequantise_blocks_of_rows,
    dequantise_experts,
    dequantise_tiles,
    quantise_blocks_of_rows,
    quantise_experts,
    quantise_tiles,
    scale_from_amax,
)

RecipeName = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]
RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)
FORMATS = ("recipe", "e4m3", "hybrid")
AMAX_ALGORITHMS = ("most_recent", "max")


class _Blocks(NamedTuple):
    length: int  # along the contraction, of x and of the gradient
    weight: tuple[int, int] | None  # a weight's tile; None: as x's, along the contraction
    scaling: Scaling


_BLOCKS = {
    "blockwise": _Blocks(128, (128, 128), "power_of_two"),
    "mxfp8": _Blocks(32, None, "e8m0"),
}


@dataclass(frozen=True)
class Fp8Recipe:
    """Which recipe to imitate, with Megatron's names and defaults.

    Attributes:
        name: tensorwise, delayed, blockwise or mxfp8.
        format: e4m3 (all operands) or hybrid (gradients in e5m2). The value ``recipe`` becomes
            TE's default: hybrid with tensorwise and delayed, e4m3 with blockwise and mxfp8.
        margin: Delayed only: scales leave 2^margin of room above the amax.
        amax_history_len: Delayed only: how many global batches an amax is remembered. 1 is
            Megatron's default; TE's own is 1024.
        amax_compute_algo: Delayed only: ``most_recent`` (Megatron's default) or ``max`` of the
            history (TE's own).

    Raises:
        ValueError: A name, format or algorithm that does not exist, or an impossible length.
    """

    name: RecipeName
    format: str = "recipe"
    margin: int = 0
    amax_history_len: int = 1
    amax_compute_algo: str = "most_recent"

    def __post_init__(self) -> None:
        _one_of("FP8 recipe", self.name, RECIPES)
        _one_of("FP8 format", self.format, FORMATS)
        _one_of("fp8_amax_compute_algo", self.amax_compute_algo, AMAX_ALGORITHMS)
        if self.amax_history_len < 1:
            raise ValueError(
                f"fp8_amax_history_len is {self.amax_history_len}, but a scale needs at least the "
                "last amax: give 1 or more."
            )
        if self.format == "recipe":
            chosen = "e4m3" if self.name in _BLOCKS else "hybrid"
            object.__setattr__(self, "format", chosen)

    @property
    def forward_dtype(self) -> torch.dtype:
        """The format of activations and weights."""
        return torch.float8_e4m3fn

    @property
    def grad_dtype(self) -> torch.dtype:
        """The format of gradients."""
        return torch.float8_e5m2 if self.format == "hybrid" else torch.float8_e4m3fn

    def dtype_of(self, slot: Slot) -> torch.dtype:
        """Return the format of ``x``, ``weight`` or ``grad``."""
        return self.grad_dtype if slot == "grad" else self.forward_dtype


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{option} is {value!r}, but must be one of {', '.join(allowed)}.")


class Fp8Emulation(torch.nn.Module):
    """Rounds the operands of the experts' three matrix products as a recipe does.

    It has no parameters; with delayed scaling ``scales`` holds its state (to be stepped by
    ``scales.end_batch`` once a global batch), else ``scales`` is None.

    All three methods take and give plain tensors, without autograd: call them inside a function
    with its own backward. Operands may be fp32, bf16 or fp16 (fp64 is first rounded to fp32);
    results are new fp32 tensors. Experts without rows, and no rows at all, are ordinary.

    Args:
        recipe: What to imitate.
        num_local_experts: e.
        device: Where the state of delayed scaling lies.

    Cost: up to three fp32 copies of an operand at a time; no communication; on CUDA a transfer of
    row indices where scales belong to experts or to blocks of their rows.
    """

    def __init__(self, recipe: Fp8Recipe, num_local_experts: int, device: Any = None) -> None:
        super().__init__()
        self.recipe = recipe
        self.scales: DelayedScales | None = None
        if recipe.name == "delayed":
            self.scales = DelayedScales(recipe, num_local_experts, device)
        self._blocks = _BLOCKS.get(recipe.name)

    def forward(self, x_RD: Tensor, weight_eFD: Tensor, rows_e: list[int]) -> tuple[Tensor, Tensor]:
        """Return the operands of ``y = x · Wᵀ``, rounded along D: ``(R, D)`` and ``(e, F, D)``."""
        x_q = self._along_columns(x_RD, rows_e, "x")
        return x_q, self._weight(weight_eFD, contraction=2)

    def grad_x(
        self, grad_RF: Tensor, weight_eFD: Tensor, rows_e: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Return the operands of ``grad · W``, rounded along F: ``(R, F)`` and ``(e, F, D)``."""
        grad_q = self._along_columns(grad_RF, rows_e, "grad")
        return grad_q, self._weight(weight_eFD, contraction=1)

    def grad_w(self, grad_RF: Tensor, x_RD: Tensor, rows_e: list[int]) -> tuple[Tensor, Tensor]:
        """Return the operands of ``gradᵀ · x`` of each expert, rounded along its rows."""
        return self._along_rows(grad_RF, rows_e, "grad"), self._along_rows(x_RD, rows_e, "x")

    @torch.no_grad()
    def _along_columns(self, x_RC: Tensor, rows_e: list[int], slot: Slot) -> Tensor:
        if self._blocks is None:
            return self._by_expert(x_RC, rows_e, slot)
        length, _, scaling = self._blocks
        return self._by_tile(x_RC, (1, length), slot, scaling)

    @torch.no_grad()
    def _along_rows(self, x_RC: Tensor, rows_e: list[int], slot: Slot) -> Tensor:
        if self._blocks is None:
            return self._by_expert(x_RC, rows_e, slot)
        length, _, scaling = self._blocks
        dtype = self.recipe.dtype_of(slot)
        quantised = quantise_blocks_of_rows(_operand(x_RC), rows_e, length, dtype, scaling)
        return dequantise_blocks_of_rows(quantised, rows_e, length)

    @torch.no_grad()
    def _weight(self, weight_eFD: Tensor, contraction: int) -> Tensor:
        if self._blocks is None:
            rows_e = [weight_eFD.shape[1]] * weight_eFD.shape[0]
            rounded = self._by_expert(weight_eFD.flatten(0, 1), rows_e, "weight")
            return rounded.view(weight_eFD.shape)
        length, tile, scaling = self._blocks
        if tile is None:
            tile = (1, length) if contraction == 2 else (length, 1)
        return self._by_tile(weight_eFD, tile, "weight", scaling)

    def _by_tile(self, x: Tensor, tile: tuple[int, int], slot: Slot, scaling: Scaling) -> Tensor:
        dtype = self.recipe.dtype_of(slot)
        return dequantise_tiles(quantise_tiles(_operand(x), tile, dtype, scaling), tile)

    def _by_expert(self, x_RC: Tensor, rows_e: list[int], slot: Slot) -> Tensor:
        x_RC, dtype = _operand(x_RC), self.recipe.dtype_of(slot)
        amax_e = amax_of_experts(x_RC, rows_e)
        if self.scales is None:
            scale_e = scale_from_amax(amax_e, dtype)
        else:
            self.scales.record(slot, amax_e)
            scale_e = self.scales.scale_of(slot)
        return dequantise_experts(quantise_experts(x_RC, rows_e, scale_e, dtype), rows_e)


def _operand(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float64 else x


def emulation_of(
    config: Any, moe: Any, num_local_experts: int, device: torch.device
) -> Fp8Emulation | None:
    """The emulation that the options ask for, or None.

    Args:
        config: A ``TransformerConfig``: margin and history of delayed scaling.
        moe: The plugin's options: recipe and format.
        num_local_experts: e.
        device: Of the state.
    """
    if moe.fp8_emulate == "none":
        return None
    recipe = Fp8Recipe(
        moe.fp8_emulate,
        moe.fp8_emulate_format,
        margin=config.fp8_margin,
        amax_history_len=config.fp8_amax_history_len,
        amax_compute_algo=config.fp8_amax_compute_algo,
    )
    return Fp8Emulation(recipe, num_local_experts, device)
