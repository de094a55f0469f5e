"""FP8 emulation: which operand gets which scale, delayed scaling, and what a recipe accepts."""

import ast
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers.fp8_by_hand import E4M3, E5M2, LARGEST, hard_numbers, values_by_hand

from megatron_moe.experts.fp8 import RECIPES, Fp8Emulation, Fp8Recipe
from megatron_moe.experts.fp8_delayed import DelayedScales, load_scales

FP32_MAX = torch.finfo(torch.float32).max

TILES = {  # recipe -> tiles of (x or gradient along its width, the same along rows, W, W for dgrad)
    "blockwise": ((1, 128), (128, 1), (128, 128), (128, 128), "power_of_two"),
    "mxfp8": ((1, 32), (32, 1), (1, 32), (32, 1), "e8m0"),
}


def operands_by_hand(recipe, x, weight, grad, rows_e):
    """Round every operand of the three products, expert by expert."""
    whole = (200, 200)
    along, rows, w, w_back, scaling = TILES.get(recipe.name, (whole,) * 4 + ("fp32",))
    fwd, bwd = E4M3, E5M2 if recipe.format == "hybrid" else E4M3

    def each(t, tile, dtype):
        return torch.cat([values_by_hand(p, tile, dtype, scaling) for p in t.split(rows_e)])

    def stack(tile):
        return torch.stack([values_by_hand(one, tile, fwd, scaling) for one in weight])

    return {
        "forward": (each(x, along, fwd), stack(w)),
        "grad_x": (each(grad, along, bwd), stack(w_back)),
        "grad_w": (each(grad, rows, bwd), each(x, rows, fwd)),
    }


@pytest.mark.parametrize("rows_e", [[3, 0, 130, 1], [0, 0]], ids=str)
@pytest.mark.parametrize("fmt", ["e4m3", "hybrid"])
@pytest.mark.parametrize("name", ["tensorwise", "blockwise", "mxfp8"])
def test_operands_of_the_three_products(name, fmt, rows_e):
    e = len(rows_e)
    x, grad = hard_numbers("x", sum(rows_e), 40), hard_numbers("grad", sum(rows_e), 35)
    weight, recipe = hard_numbers("weight", e, 35, 40), Fp8Recipe(name, fmt)
    expected = operands_by_hand(recipe, x, weight, grad, rows_e)
    emulation = Fp8Emulation(recipe, e)
    found = {
        "forward": emulation(x, weight, rows_e),
        "grad_x": emulation.grad_x(grad, weight, rows_e),
        "grad_w": emulation.grad_w(grad, x, rows_e),
    }
    for product, pair in expected.items():
        for ours, theirs in zip(found[product], pair, strict=True):
            assert torch.equal(ours, theirs), product
    assert list(emulation.state_dict()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_other_dtypes_as_fp32_without_autograd(name, dtype):
    rows_e, emulation = [2, 0, 37], Fp8Emulation(Fp8Recipe(name), 3)
    x, weight = torch.randn(39, 40, dtype=dtype), torch.randn(3, 8, 40, dtype=dtype)
    kept = x.clone()
    x.requires_grad_()
    for product in (emulation, lambda a, b, c: emulation.grad_w(a, a, c)):
        found = product(x, weight, rows_e)
        expected = product(x.float(), weight.float(), rows_e)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == torch.float32
            assert not ours.requires_grad
            assert torch.equal(ours, theirs)
    assert torch.equal(x, kept)


def test_fp64_is_rounded_to_fp32_before_it_is_scaled():
    amax_e = torch.arange(3, 203, dtype=torch.float64)
    middle = torch.tensor([448.0, 17.0, 19.0, 21.0, 23.0], dtype=torch.float64)  # 448: the amax
    x, weight = amax_e[:, None] * middle / 448, torch.ones(200, 1, 5)
    emulation = Fp8Emulation(Fp8Recipe("tensorwise"), 200)
    found, expected = (emulation(t, weight, [1] * 200)[0] for t in (x, x.float()))
    assert torch.equal(found, expected)


def te_step(history, scale, last, largest, algorithm):
    """Step one tensor's history (a list) and scale as TE's kernel is documented to."""
    if last == 0:
        return history, scale
    rolled = [*history[1:], last]
    amax = max(rolled) if algorithm == "max" else last
    if math.isfinite(amax):
        scale = min(float(torch.tensor(largest) / torch.tensor(amax)), FP32_MAX)
    return [0.0, *rolled[1:]], scale


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_history_and_scales_step_as_te_does(length, algorithm):
    recipe = Fp8Recipe("delayed", margin=2, amax_history_len=length, amax_compute_algo=algorithm)
    scales = DelayedScales(recipe, 2)
    expected = {(i, j): ([0.0] * length, 1.0) for i in range(2) for j in range(3)}
    slots = ["x", "weight", "grad"]
    amaxes = [3.0, 0.0, 7.0, math.inf, 2.0, 1e-41, 0.0, 0.5, 0.25, 0.125, 1e4]
    for step in range(len(amaxes)):
        for j, slot in enumerate(slots):
            amax_e = torch.tensor([amaxes[step - j], amaxes[step - j - 4]])
            scales.record(slot, amax_e / 2)
            scales.record(slot, amax_e)
            largest = (LARGEST[E5M2] if slot == "grad" else LARGEST[E4M3]) / 4
            for i in range(2):
                expected[i, j] = te_step(*expected[i, j], float(amax_e[i]), largest, algorithm)
        scales.end_batch()
        for (i, j), (history, scale) in expected.items():
            assert scales.amax_history[i, j].tolist() == history, (step, i, j)
            assert float(scales.scale[i, j]) == scale, (step, i, j)
        assert scales.seen.count_nonzero() == 0


def batch(emulation, x, weight, grad, rows_e):
    """Take the operands of all three products once."""
    return (
        *emulation(x, weight, rows_e),
        *emulation.grad_x(grad, weight, rows_e),
        *emulation.grad_w(grad, x, rows_e),
    )


def test_delayed_scaling_uses_the_last_batch_and_only_steps_at_its_end():
    emulation, rows_e = Fp8Emulation(Fp8Recipe("delayed"), 2), [3, 2]
    current = Fp8Emulation(Fp8Recipe("tensorwise"), 2)
    assert emulation.scales is not None
    torch.manual_seed(0)
    inputs = (torch.randn(5, 8), torch.randn(2, 6, 8), torch.randn(5, 6), rows_e)
    first = batch(emulation, *inputs)
    again = batch(emulation, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    unscaled = inputs[0].to(E4M3).float()  # the scale is 1 before the first step
    assert torch.equal(first[0], unscaled)
    emulation.scales.end_batch()
    after = batch(emulation, *inputs)
    now = batch(current, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(after, now, strict=True))
    assert not torch.equal(after[0], unscaled)


def test_micro_batches_and_recomputation_leave_the_same_scales():
    rows_e, recipe = [3, 2], Fp8Recipe("delayed", amax_history_len=3, amax_compute_algo="max")
    torch.manual_seed(0)
    x, weight, grad = torch.randn(5, 8), torch.randn(2, 6, 8), torch.randn(5, 6)
    whole, parts = Fp8Emulation(recipe, 2), Fp8Emulation(recipe, 2)
    batch(whole, x, weight, grad, rows_e)
    batch(parts, x[[0, 1]], weight, grad[[0, 1]], [2, 0])
    for _ in range(2):  # the second time is a recomputation
        batch(parts, x[2:], weight, grad[2:], [1, 2])
    for emulation in (whole, parts):
        emulation.scales.end_batch()
    assert torch.equal(whole.scales.scale, parts.scales.scale)
    assert torch.equal(whole.scales.amax_history, parts.scales.amax_history)


def test_evaluation_leaves_no_trace():
    emulation = Fp8Emulation(Fp8Recipe("delayed"), 1).eval()
    emulation(torch.ones(2, 4), torch.ones(1, 4, 4), [2])
    assert emulation.scales.seen.count_nonzero() == 0
    emulation.train()(torch.ones(2, 4), torch.ones(1, 4, 4), [2])
    assert emulation.scales.seen.tolist() == [[1.0, 1.0, 0.0]]


def test_end_of_batch_reduces_before_it_steps():
    scales = DelayedScales(Fp8Recipe("delayed", "e4m3"), 1)
    scales.record("x", torch.tensor([1.0]))
    other_rank = torch.tensor([[7.0, 14.0, 0.0]])
    scales.end_batch(lambda seen: seen.copy_(torch.maximum(seen, other_rank)))
    assert scales.scale.tolist() == [[64.0, 32.0, 1.0]]


def scales_that_saw(*amaxes):
    scales = DelayedScales(Fp8Recipe("delayed", amax_history_len=3), len(amaxes))
    scales.record("x", torch.tensor(amaxes))
    scales.end_batch()
    return scales


@pytest.mark.parametrize("stacked", [True, False])
def test_state_survives_a_checkpoint(stacked):
    first, second = scales_that_saw(1.1, 2.3), scales_that_saw(7.0, 7.0)
    state = {
        f"fc.{name}{suffix}": part.clone()
        for name, kept in first.kept().items()
        for suffix, part in ([("", kept)] if stacked else enumerate(kept))
    }
    errors = []
    load_scales(second, state, "fc.", errors)
    assert not errors and not state
    assert torch.equal(second.scale, first.scale)
    assert torch.equal(second.amax_history, first.amax_history)


def test_state_that_is_absent_or_over_is_no_fault_but_another_length_is():
    scales, errors = scales_that_saw(7.0, 7.0), []
    before = scales.scale.clone()
    load_scales(scales, {}, "fc.", errors)
    load_scales(None, state := {"fc.fp8_scale": before}, "fc.", errors)
    assert not errors and not state and torch.equal(scales.scale, before)
    load_scales(scales, {"fc.fp8_amax_history": torch.zeros(2, 3, 9)}, "fc.", errors)
    assert "--fp8-amax-history-len must be what it was" in errors[0]


def test_state_is_not_cast_with_the_module():
    scales = scales_that_saw(1.1, 2.3)
    before = scales.scale.clone()
    scales.bfloat16()
    assert torch.equal(scales.scale, before)
    assert not torch.equal(before, before.bfloat16().float())


def test_recipes_defaults():
    formats = {name: Fp8Recipe(name).format for name in RECIPES}
    hybrid, e4m3 = "hybrid", "e4m3"
    assert formats == {
        "tensorwise": hybrid, "delayed": hybrid, "blockwise": e4m3, "mxfp8": e4m3
    }  # fmt: skip
    assert Fp8Recipe("mxfp8", "hybrid").grad_dtype == E5M2
    assert Fp8Recipe("delayed", "e4m3").grad_dtype == E4M3
    assert Fp8Recipe("delayed") == Fp8Recipe("delayed", "hybrid")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "int8"}, "FP8 recipe is 'int8', but must be one of tensorwise, delayed, block"),
        ({"name": "mxfp8", "format": "e5m2"}, "format is 'e5m2', but must be one of recipe, e4m3"),
        ({"name": "delayed", "amax_history_len": 0}, "fp8_amax_history_len is 0, but a scale"),
        ({"name": "delayed", "amax_compute_algo": "mean"}, "algo is 'mean', but must be one of mo"),
    ],
)
def test_wrong_recipes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Fp8Recipe(**options)


def megatron_source(path: str) -> ast.Module:
    """Parse a file of the installed Megatron without importing it, which takes seconds."""
    folder = Path(next(iter(find_spec("megatron").submodule_search_locations)))
    return ast.parse((folder / path).read_text())


def test_defaults_of_delayed_scaling_are_megatrons():
    source = megatron_source("core/transformer/transformer_config.py")
    theirs = {
        node.target.id: node.value.value
        for node in ast.walk(source)
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Constant)
    }
    recipe = Fp8Recipe("delayed")
    for ours, option in (
        (recipe.margin, "fp8_margin"),
        (recipe.amax_history_len, "fp8_amax_history_len"),
        (recipe.amax_compute_algo, "fp8_amax_compute_algo"),
    ):
        assert theirs[option] == ours, option
