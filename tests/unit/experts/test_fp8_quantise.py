"""FP8 quantisation: against the formats by hand, TE's worked cases, and what a format promises."""

import math

import pytest
import torch
from helpers.fp8_by_hand import (
    E4M3,
    E5M2,
    bytes_of,
    code_of,
    codes_by_hand,
    equal_or_nan,
    exponent_of,
    hard_numbers,
    quantise_by_hand,
    scale_of,
    tiles_by_hand,
    value_of,
    values_by_hand,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.experts import fp8_quantise as fq

FORMATS = [E4M3, E5M2]
SCALINGS = ["fp32", "power_of_two", "e8m0"]
FP32_MAX = torch.finfo(torch.float32).max
ROWS = [[3, 0, 130, 1], [0, 0], [1], [128, 32, 5]]


KINDS = ["ordinary", "huge", "subnormal", "zero", "inf", "nan", "both"]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_code_and_every_midpoint_rounds_to_nearest_even(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    values = torch.tensor([value_of(code, dtype) for code in range(256)])
    assert equal_or_nan(codes.view(dtype).float(), values)

    finite = values[values.isfinite()].sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    beyond = torch.tensor([460.0, 464.0, 1e6, FP32_MAX, math.inf, 1e-45, 0.0, math.nan])
    x = torch.cat((finite, middle, middle.nextafter(up), middle.nextafter(down), beyond, -beyond))
    expected = [code_of(float(number), dtype) for number in x]
    assert bytes_of(fq.saturating_cast(x.clone(), dtype)).tolist() == expected


@pytest.mark.parametrize(
    ("amax", "dtype", "power_of_two", "expected"),
    [
        (448.0, E4M3, False, 1.0),
        (3.0, E4M3, False, 149.3333282470703125),
        (3.0, E4M3, True, 128.0),
        (3.5, E4M3, True, 128.0),
        (3.5000002384185791015625, E4M3, True, 64.0),
        (3.0, E5M2, True, 16384.0),
        (0.0, E4M3, False, 1.0),
        (math.inf, E4M3, False, 1.0),
        (math.nan, E4M3, True, 1.0),
        (1e-40, E4M3, False, FP32_MAX),
        (1e-40, E4M3, True, 2.0**127),
        (FP32_MAX, E4M3, True, 2.0**-120),
    ],
)
def test_worked_scales(amax, dtype, power_of_two, expected):
    scale = fq.scale_from_amax(torch.tensor([amax]), dtype, power_of_two=power_of_two)
    assert scale.tolist() == [expected]


@pytest.mark.parametrize(
    ("amax", "dtype", "expected"),
    [
        (0.0, E4M3, 0),
        (1e-45, E4M3, 0),
        (448.0 * 2.0**-126, E4M3, 1),
        (448.0 * 2.0**-125, E4M3, 2),
        (448.0, E4M3, 127),
        (448.00003, E4M3, 128),
        (449.0, E4M3, 128),
        (1.0, E4M3, 119),
        (1.0, E5M2, 112),
        (FP32_MAX, E4M3, 247),
        (math.inf, E4M3, 254),
        (math.nan, E4M3, 255),
    ],
)
def test_worked_exponents(amax, dtype, expected):
    assert fq.exponent_from_amax(torch.tensor([amax]), dtype).tolist() == [expected]


def test_exponents_are_powers_of_two_at_both_ends():
    bytes_ = torch.tensor([0, 1, 127, 253, 254, 255], dtype=torch.uint8)
    powers = fq.power_of_exponent(bytes_).tolist()
    assert powers[:5] == [2.0**-127, 2.0**-126, 1.0, 2.0**126, 2.0**127]
    inverse = fq.power_of_exponent(bytes_, reciprocal=True).tolist()
    assert inverse[:5] == [2.0**127, 2.0**126, 1.0, 2.0**-126, 2.0**-127]
    assert math.isnan(powers[5])
    assert math.isnan(inverse[5])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_scales_of_many_amaxes_to_the_last_bit(dtype):
    amax = torch.rand(3000, generator=torch.Generator().manual_seed(0))
    amax *= 10.0 ** torch.linspace(-44, 38, 3000)
    for power_of_two, scaling in ((False, "fp32"), (True, "power_of_two")):
        found = fq.scale_from_amax(amax, dtype, power_of_two=power_of_two)
        expected = [float(scale_of(float(a), dtype, scaling)[0]) for a in amax]
        assert found.tolist() == expected
    found = fq.exponent_from_amax(amax, dtype).tolist()
    assert found == [exponent_of(float(a), dtype) for a in amax]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    ("tile", "shape"),
    [((1, 128), (5, 300)), ((128, 128), (130, 140)), ((1, 32), (6, 70)), ((32, 1), (70, 6))],
    ids=str,
)
def test_tiles_as_by_hand(tile, shape, scaling, kind):
    x, dtype = hard_numbers(kind, *shape), E4M3 if kind != "ordinary" else E5M2
    codes, stored = tiles_by_hand(x, tile, dtype, scaling)
    found = fq.quantise_tiles(x, tile, dtype, scaling)
    assert torch.equal(bytes_of(found.codes), codes)
    assert found.scale_inv.tolist() == stored.tolist()
    assert equal_or_nan(fq.dequantise_tiles(found, tile), values_by_hand(x, tile, dtype, scaling))


@pytest.mark.parametrize("rows_e", ROWS, ids=str)
@pytest.mark.parametrize("kind", ["ordinary", "both"])
def test_blocks_of_rows_start_at_each_experts_first_row(kind, rows_e):
    x = hard_numbers(kind, sum(rows_e), 7)
    for block, scaling in ((128, "power_of_two"), (32, "e8m0")):
        by_hand = [tiles_by_hand(p, (block, 1), E4M3, scaling) for p in x.split(rows_e)]
        found = fq.quantise_blocks_of_rows(x, rows_e, block, E4M3, scaling)
        assert torch.equal(bytes_of(found.codes), torch.cat([codes for codes, _ in by_hand]))
        assert found.scale_inv.tolist() == torch.cat([s for _, s in by_hand]).tolist()
        values = [values_by_hand(p, (block, 1), E4M3, scaling) for p in x.split(rows_e)]
        assert equal_or_nan(fq.dequantise_blocks_of_rows(found, rows_e, block), torch.cat(values))


@pytest.mark.parametrize("rows_e", ROWS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_scale_an_expert(kind, rows_e):
    x = hard_numbers(kind, sum(rows_e), 7)
    by_hand = [quantise_by_hand(part, E5M2, "fp32") for part in x.split(rows_e)]
    amax_e = fq.amax_of_experts(x, rows_e)
    found = fq.quantise_experts(x, rows_e, fq.scale_from_amax(amax_e, E5M2), E5M2)
    assert torch.equal(bytes_of(found.codes), torch.cat([codes for codes, _ in by_hand]))
    assert found.scale_inv.tolist() == [stored for _, stored in by_hand]


def test_a_scale_of_the_past_saturates_what_outgrew_it():
    x = torch.tensor([[1.0, -100.0], [FP32_MAX, 3.0]])
    scale_e = torch.tensor([32.0, 1e30])
    found = fq.quantise_experts(x, [1, 1], scale_e, E4M3)
    by_hand = [codes_by_hand(x[i], scale_e[i].numpy(), E4M3).tolist() for i in range(2)]
    assert bytes_of(found.codes).tolist() == by_hand
    assert found.codes.float().tolist() == [[32.0, -448.0], [448.0, 448.0]]


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.sampled_from(["power_of_two", "e8m0"]), st.integers(-40, 40))
def test_blocks_keep_what_the_format_promises(seed, scaling, log_size):
    x = torch.randn(4, 70, generator=torch.Generator().manual_seed(seed)) * 2.0**log_size
    quantised = fq.quantise_tiles(x, (1, 32), E4M3, scaling)
    value, stored = fq.dequantise_tiles(quantised, (1, 32)), quantised.scale_inv
    inverse = fq.power_of_exponent(stored) if scaling == "e8m0" else stored
    assert bool((torch.frexp(inverse).mantissa == 0.5).all()), "a scale is no power of two"
    size = x.abs() / inverse.repeat_interleave(32, 1)[:, :70]
    normal = size >= 2.0**-6
    assert bool(((value - x).abs() <= x.abs() * 2.0**-4)[normal].all())
    largest = torch.stack([part.amax(1) for part in size.split(32, 1)], 1)
    assert bool((largest <= 448.0 * (1 + 2.0**-22)).all())
    assert bool((largest > 223.9).all()), "a power of two of the range is unused"


def test_what_fp8_holds_exactly_comes_through_untouched():
    values = torch.tensor([v for c in range(256) if math.isfinite(v := value_of(c, E4M3))])
    x = values[torch.randint(len(values), (60, 64), generator=torch.Generator().manual_seed(1))]
    x[:, ::32] = 448.0
    for tile, scaling in (((1, 32), "e8m0"), ((1, 128), "power_of_two"), ((60, 64), "fp32")):
        assert torch.equal(fq.dequantise_tiles(fq.quantise_tiles(x, tile, E4M3, scaling), tile), x)
