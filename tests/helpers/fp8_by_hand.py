"""FP8 one number at a time, from the formats' definitions: the slow side of comparisons.

Shares nothing with the package: values come from bit patterns, rounding from a search among
neighbours, scales from numpy's fp32 and ``frexp``.
"""

import math
from bisect import bisect_left
from itertools import product

import numpy as np
import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
NAN_CODE = 0x7F
_FP32_MAX = float(np.finfo(np.float32).max)


def value_of(code: int, dtype: torch.dtype) -> float:
    """Return the number a byte stands for."""
    mantissa_bits, bias = (3, 7) if dtype == E4M3 else (2, 15)
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    if dtype == E4M3 and (code & 0x7F) == 0x7F:
        return math.nan
    if dtype == E5M2 and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    fraction = mantissa / (1 << mantissa_bits)
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias)
    return sign * (1 + fraction) * 2.0 ** (exponent - bias)


_FINITE = {
    dtype: [v for code in range(128) if math.isfinite(v := value_of(code, dtype))]
    for dtype in (E4M3, E5M2)
}


def code_of(number: float, dtype: torch.dtype) -> int:
    """Round to nearest, ties to the even code, saturating; NaN is 0x7F."""
    if math.isnan(number):
        return NAN_CODE
    values, size = _FINITE[dtype], abs(number)
    above = bisect_left(values, size)  # a code is its value's place: positive codes are in order
    if above == len(values):
        code = len(values) - 1
    elif values[above] == size:
        code = above
    else:
        low, high = size - values[above - 1], values[above] - size
        code = above - 1 if low < high or (low == high and above % 2 == 1) else above
    return code | (0x80 if math.copysign(1.0, number) < 0 else 0)


def scale_of(amax: float, dtype: torch.dtype, scaling: str) -> tuple[np.float32, float]:
    """Return what multiplies, and what is stored: its reciprocal, or MXFP8's exponent."""
    if scaling == "e8m0":
        exponent = exponent_of(amax, dtype)
        return np.float32(2.0 ** (127 - exponent)), exponent
    scale = np.float32(1.0)
    if 0 < amax < math.inf:
        with np.errstate(over="ignore"):
            scale = np.float32(LARGEST[dtype]) / np.float32(amax)
        scale = min(scale, np.float32(_FP32_MAX))
        if scaling == "power_of_two":
            scale = np.float32(2.0 ** (math.frexp(float(scale))[1] - 1))
    return scale, float(np.float32(1.0) / scale)


def exponent_of(amax: float, dtype: torch.dtype) -> int:
    """Return the smallest byte b with 2^(b-127) at least ``amax · fp32(1 / largest)``."""
    if math.isinf(amax):
        return 254
    mantissa, exponent = math.frexp(float(np.float32(amax) * np.float32(1 / LARGEST[dtype])))
    if mantissa == 0:
        return 0
    return min(max(exponent + 127 - (mantissa == 0.5), 0), 254)


def quantise_by_hand(x: Tensor, dtype: torch.dtype, scaling: str) -> tuple[Tensor, float]:
    """Quantise one group, of any shape, with one scale: the codes as uint8, and what is stored."""
    numbers = x.float().flatten().tolist()
    amax = max((abs(n) for n in numbers if not math.isnan(n)), default=0.0)
    scale, stored = scale_of(amax, dtype, scaling)
    return codes_by_hand(x, scale, dtype), stored


def codes_by_hand(x: Tensor, scale: np.float32, dtype: torch.dtype) -> Tensor:
    """Multiply each element by the scale in fp32 and round it."""
    with np.errstate(over="ignore"):
        scaled = x.float().numpy() * np.float32(scale)
    codes = [code_of(float(n), dtype) for n in scaled.ravel()]
    return torch.tensor(codes, dtype=torch.uint8).view(x.shape)


def tiles_by_hand(
    x: Tensor, tile: tuple[int, int], dtype: torch.dtype, scaling: str
) -> tuple[Tensor, Tensor]:
    """Quantise a matrix tile by tile: codes ``(M, N)`` and what is stored, one a tile."""
    (rows, columns), (m, n) = x.shape, tile
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    stored = torch.zeros(-(-rows // m), -(-columns // n), dtype=torch.float64)
    for i, j in product(range(stored.shape[0]), range(stored.shape[1])):
        part = slice(i * m, (i + 1) * m), slice(j * n, (j + 1) * n)
        codes[part], stored[i, j] = quantise_by_hand(x[part], dtype, scaling)
    return codes, stored


def values_by_hand(x: Tensor, tile: tuple[int, int], dtype: torch.dtype, scaling: str) -> Tensor:
    """Quantise a matrix tile by tile and return what the codes stand for, in fp32."""
    codes, stored = tiles_by_hand(x, tile, dtype, scaling)
    if scaling == "e8m0":
        stored = 2.0 ** (stored - 127)
    factor = stored.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
    values = [value_of(code, dtype) for code in codes.flatten().tolist()]
    exact = torch.tensor(values, dtype=torch.float64).view(x.shape)
    return (exact * factor[: x.shape[0], : x.shape[1]]).float()


def bytes_of(codes: Tensor) -> Tensor:
    """View float8 codes as uint8, every NaN as 0x7F."""
    nan = codes.float().isnan()
    return torch.where(nan, torch.tensor(NAN_CODE, dtype=torch.uint8), codes.view(torch.uint8))


def equal_or_nan(found: Tensor, expected: Tensor) -> bool:
    """Tell whether two tensors are the same, NaN in the same places counting as the same."""
    both_nan = found.isnan() & expected.isnan()
    return found.shape == expected.shape and bool(((found == expected) | both_nan).all())


def hard_numbers(kind: str, *shape: int) -> torch.Tensor:
    """Make a tensor whose blocks have very different amaxes, with what makes rules differ."""
    generator = torch.Generator().manual_seed(len(kind))
    x = torch.randn(shape, generator=generator) * 4.0 ** torch.randint(
        -9, 9, shape, generator=generator
    )
    if kind == "huge" and x.numel():
        return x * (_FP32_MAX / x.abs().amax())
    if kind == "subnormal" and x.numel():
        return x * (1e-41 / x.abs().amax())
    if kind == "zero":
        return x * 0
    special = {"inf": [math.inf, -math.inf], "nan": [math.nan], "both": [math.nan, -math.inf]}
    for i, number in enumerate(special.get(kind, [])):
        x.view(-1)[i * 7 + 2 :: 211] = number
    return x
