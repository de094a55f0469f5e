"""FP8 quantisation as Transformer Engine publishes it, in plain torch on any device.

Every function here is one formula of Transformer Engine's (TE), bit for bit:

* an **amax** is the largest magnitude of a group of elements, NaN left out;
* a **scale** is ``fp8_max / amax`` in fp32, 1 where amax is zero or infinite, the largest finite
  fp32 where the quotient overflows; block scaling then drops its mantissa (a power of two);
* MXFP8 instead stores the **exponent** of ``amax · (1 / fp8_max)``, rounded up, in eight bits
  (E8M0: the byte b stands for 2^(b-127));
* a **code** is ``x · scale``, rounded to nearest even and saturated: infinity becomes the largest
  finite value, NaN stays NaN;
* dequantising multiplies a code by ``scale_inv``, the fp32 reciprocal of its scale.

Two ways to share a scale: *tiles* of the last two axes (blocks along a row, squares of a weight,
whole weights) and *groups* of rows (each expert's rows; blocks along each expert's rows).
A last tile that is cut short is as TE's, which pads with zeros: a zero changes no amax.

Where TE differs by hardware, this follows Hopper's kernels for per-tensor and 128-wide blocks (on
Blackwell TE computes the same codes and scales, and hands them to the MXFP8 units), and
Blackwell's for MXFP8 (the only one that has it).

Source: Transformer Engine 2.20, ``common/recipe/recipe_common.cuh``,
``common/transpose/quantize_transpose_{vector,square}_blockwise.cu``,
``common/cast/mxfp8/quantize_mxfp8.cuh``, ``common/util/ptx*.cuh``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}

# How a group's scale is made of its amax: fp32 as it is, its power of two, or MXFP8's exponent.
Scaling = Literal["fp32", "power_of_two", "e8m0"]

_FP32_MAX = torch.finfo(torch.float32).max
_EXPONENT_BITS = -0x800000  # 0xFF800000 as an int32: sign and exponent of an fp32
_MANTISSA_BITS = 0x7FFFFF
_TWO_TO_MINUS_127 = 0x400000  # subnormal, so not an exponent shifted into place


class Quantised(NamedTuple):
    """Codes, and what one is multiplied by to get its value back.

    Attributes:
        codes: float8_e4m3fn or float8_e5m2, the shape of what was quantised.
        scale_inv: One entry a scale: fp32, or uint8 with E8M0 exponents.
    """

    codes: Tensor
    scale_inv: Tensor


def amax_over(x: Tensor, dims: tuple[int, ...], *, keepdim: bool = False) -> Tensor:
    """Return the largest magnitude over some axes, leaving NaN out, as TE's kernels do.

    Args:
        x: Any floating dtype.
        dims: The axes to reduce. They may be empty axes only where the result is empty too.
        keepdim: Keep the reduced axes with size 1.

    Returns:
        fp32, 0 where there is nothing but NaN.

    Cost: one copy of ``x`` in its own dtype, freed on return.
    """
    magnitude = x.abs().nan_to_num_(nan=0.0, posinf=float("inf"))
    return magnitude.amax(dims, keepdim=keepdim).float()


def scale_from_amax(amax: Tensor, dtype: torch.dtype, *, power_of_two: bool = False) -> Tensor:
    """Return the scale that maps ``amax`` to the format's largest value.

    Args:
        amax: fp32, any shape, not negative.
        dtype: The FP8 format.
        power_of_two: Drop the mantissa, that is round down to a power of two.

    Returns:
        fp32, the shape of ``amax``, always finite and above zero.
    """
    # Tensor by tensor: torch turns `number / tensor` into a reciprocal and a product, which
    # rounds twice and differs from TE's quotient in the last bit.
    scale = torch.full_like(amax, FP8_MAX[dtype]) / amax
    scale = scale.clamp(max=_FP32_MAX)  # an amax so small that the quotient overflows
    if power_of_two:
        scale = (scale.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    usable = (amax > 0) & amax.isfinite()
    return torch.where(usable, scale, torch.ones_like(scale))


def exponent_from_amax(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return MXFP8's shared exponent: E8M0 of ``amax / fp8_max``, rounded up.

    Args:
        amax: fp32, any shape, not negative.
        dtype: The FP8 format.

    Returns:
        uint8, the shape of ``amax``; 254 for infinity, 255 for NaN.
    """
    # A product with the fp32 reciprocal, as in TE, not a quotient: the last bit may differ.
    bits = (amax * torch.full_like(amax, 1.0 / FP8_MAX[dtype])).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & _MANTISSA_BITS
    stays = (mantissa == 0) | (exponent == 254)
    stays |= (exponent == 0) & (mantissa <= _TWO_TO_MINUS_127)
    exponent = torch.where(stays, exponent, exponent + 1)
    exponent = torch.where(amax.isinf(), 254, exponent)
    return torch.where(amax.isnan(), 255, exponent).to(torch.uint8)


def power_of_exponent(exponent: Tensor, *, reciprocal: bool = False) -> Tensor:
    """Return 2^(exponent-127), the value of an E8M0 byte, or 2^(127-exponent).

    Args:
        exponent: uint8, any shape.
        reciprocal: Return the factor that quantises, not the one that dequantises.

    Returns:
        fp32, the shape of ``exponent``; NaN for 255.
    """
    biased = exponent.to(torch.int32)
    bits = 254 - biased if reciprocal else biased
    bits = torch.where(bits == 0, _TWO_TO_MINUS_127, bits << 23)
    power = bits.view(torch.float32)
    return torch.where(biased == 255, torch.full_like(power, float("nan")), power)


def saturating_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 to the nearest FP8 value, ties to even; beyond the largest, take the largest.

    Args:
        x: fp32, overwritten.
        dtype: The FP8 format.
    """
    # Torch's own cast makes NaN (e4m3) or infinity (e5m2) of what is too large.
    return x.clamp_(-FP8_MAX[dtype], FP8_MAX[dtype]).to(dtype)


def quantise_tiles(
    x: Tensor, tile: tuple[int, int], dtype: torch.dtype, scaling: Scaling
) -> Quantised:
    """Quantise with one scale for each tile of the last two axes.

    Args:
        x: ``(..., M, N)``, fp32, bf16 or fp16. Zero rows are fine.
        tile: Rows and columns of a tile, such as (1, 128) or (128, 128); the last one of an axis
            may be cut short.
        dtype: The FP8 format.
        scaling: How a scale is made of an amax.

    Returns:
        ``Quantised``: codes ``(..., M, N)``, scale_inv ``(..., ceil(M / m), ceil(N / n))``.

    Cost: one fp32 copy of ``x``, and one of its own dtype where a tile is cut short.
    """
    tiles = _cut(x, tile)
    amax = amax_over(tiles, (-3, -1), keepdim=True)
    scale, scale_inv = _scale_and_inverse(amax, dtype, scaling)
    codes = saturating_cast(tiles * scale, dtype)
    return Quantised(_join(codes, x.shape), scale_inv.squeeze(-1).squeeze(-2))


def dequantise_tiles(quantised: Quantised, tile: tuple[int, int]) -> Tensor:
    """Return the fp32 values of what ``quantise_tiles`` made, with the same ``tile``."""
    codes, scale_inv = quantised
    tiles = _cut(codes.float(), tile)
    return _join(tiles.mul_(_as_float(scale_inv)[..., :, None, :, None]), codes.shape)


def quantise_blocks_of_rows(
    x_RC: Tensor, rows_e: list[int], block: int, dtype: torch.dtype, scaling: Scaling
) -> Quantised:
    """Quantise with one scale for ``block`` rows of one expert and one column.

    Blocks start at each expert's first row: an expert's last block is cut short where the next
    expert begins, and experts without rows have no block.

    Args:
        x_RC: ``(R, C)``, the experts' rows one after the other.
        rows_e: Rows of each expert; their sum is R.
        block: Rows of a block.
        dtype: The FP8 format.
        scaling: How a scale is made of an amax.

    Returns:
        ``Quantised``: codes ``(R, C)``, scale_inv ``(blocks, C)``, blocks in the order of rows.

    Cost: as ``quantise_tiles``, and a copy with up to ``block - 1`` zero rows more an expert.
    """
    place_R, padded_rows = _block_places(rows_e, block, x_RC.device)
    codes, scale_inv = quantise_tiles(
        _spread(x_RC, place_R, padded_rows), (block, 1), dtype, scaling
    )
    if padded_rows != x_RC.shape[0]:
        codes = codes.view(torch.uint8)[place_R].view(dtype)
    return Quantised(codes, scale_inv)


def dequantise_blocks_of_rows(quantised: Quantised, rows_e: list[int], block: int) -> Tensor:
    """Return the fp32 values of what ``quantise_blocks_of_rows`` made, ``(R, C)``."""
    codes, scale_inv = quantised
    place_R, _ = _block_places(rows_e, block, codes.device)
    return codes.float().mul_(_as_float(scale_inv)[place_R // block])


def amax_of_experts(x_RC: Tensor, rows_e: list[int]) -> Tensor:
    """Return each expert's amax ``(e,)`` fp32; 0 for an expert without rows."""
    nothing = torch.zeros((), dtype=torch.float32, device=x_RC.device)
    parts = x_RC.split(rows_e)
    return torch.stack([amax_over(part, (0, 1)) if len(part) else nothing for part in parts])


def quantise_experts(
    x_RC: Tensor, rows_e: list[int], scale_e: Tensor, dtype: torch.dtype
) -> Quantised:
    """Quantise each expert's rows with the scale given for it.

    Args:
        x_RC: ``(R, C)``, the experts' rows one after the other.
        rows_e: Rows of each expert; their sum is R.
        scale_e: ``(e,)`` fp32, of ``scale_from_amax`` or from a history.
        dtype: The FP8 format.

    Returns:
        ``Quantised``: codes ``(R, C)``, scale_inv ``(e,)``.

    Cost: one fp32 copy of ``x``.
    """
    return Quantised(saturating_cast(x_RC * _by_row(scale_e, rows_e), dtype), scale_e.reciprocal())


def dequantise_experts(quantised: Quantised, rows_e: list[int]) -> Tensor:
    """Return the fp32 values of what ``quantise_experts`` made, ``(R, C)``."""
    codes, scale_inv_e = quantised
    return codes.float().mul_(_by_row(scale_inv_e, rows_e))


def _scale_and_inverse(amax: Tensor, dtype: torch.dtype, scaling: Scaling) -> tuple[Tensor, Tensor]:
    if scaling == "e8m0":
        exponent = exponent_from_amax(amax, dtype)
        return power_of_exponent(exponent, reciprocal=True), exponent
    scale = scale_from_amax(amax, dtype, power_of_two=scaling == "power_of_two")
    return scale, scale.reciprocal()


def _as_float(scale_inv: Tensor) -> Tensor:
    return power_of_exponent(scale_inv) if scale_inv.dtype == torch.uint8 else scale_inv


def _cut(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """View ``(..., M, N)`` as ``(..., tiles, m, tiles, n)``, zeros added to cut-short tiles."""
    (m, n), (rows, columns) = tile, x.shape[-2:]
    if columns % n or rows % m:
        x = torch.nn.functional.pad(x, (0, -columns % n, 0, -rows % m))
    return x.unflatten(-1, (x.shape[-1] // n, n)).unflatten(-3, (x.shape[-2] // m, m))


def _join(tiles: Tensor, shape: torch.Size) -> Tensor:
    """Undo ``_cut``: back to ``shape``, without the zeros that were added."""
    whole = tiles.flatten(-4, -3).flatten(-2, -1)
    return whole[..., : shape[-2], : shape[-1]].contiguous()


def _block_places(rows_e: list[int], block: int, device: torch.device) -> tuple[Tensor, int]:
    """Return where each row goes once every expert has whole blocks, and the rows there are then.

    Made on the host, where ``rows_e`` is, and then sent.
    """
    rows = torch.tensor(rows_e, dtype=torch.int64)
    added = -rows % block
    before = added.cumsum(0) - added
    place_R = torch.arange(sum(rows_e)) + before.repeat_interleave(rows)
    return place_R.to(device), int((rows + added).sum())


def _spread(x_RC: Tensor, place_R: Tensor, padded_rows: int) -> Tensor:
    if padded_rows == x_RC.shape[0]:
        return x_RC
    spread = x_RC.new_zeros(padded_rows, x_RC.shape[1])
    spread[place_R] = x_RC
    return spread


def _by_row(value_e: Tensor, rows_e: list[int]) -> Tensor:
    """Repeat each expert's value for its rows: ``(R, 1)``."""
    repeats = torch.tensor(rows_e, dtype=torch.int64)
    index_R = torch.arange(len(rows_e)).repeat_interleave(repeats)
    return value_e[index_R.to(value_e.device)].unsqueeze(1)
