"""FP8 emulation against Transformer Engine's own kernels: codes and scales bit for bit.

Written for Transformer Engine 2.18 to 2.20. MXFP8 needs Blackwell; the rest runs on Hopper too.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.fp8_by_hand import E4M3, E5M2, bytes_of

from megatron_moe.experts import fp8_quantise as fq
from megatron_moe.experts.fp8 import DelayedScales, Fp8Emulation, Fp8Recipe

pytestmark = [pytest.mark.gpu, pytest.mark.te]

INPUTS = [torch.bfloat16, torch.float32]
KINDS = ["ordinary", "huge", "tiny", "zero", "inf", "nan"]


@pytest.fixture(scope="module")
def te() -> SimpleNamespace:
    """Transformer Engine's names that the tests use, or a skip that says what is missing."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytorch = pytest.importorskip(
        "transformer_engine.pytorch", reason="needs Transformer Engine (pip install it for CUDA)"
    )
    import transformer_engine_torch as extension
    from transformer_engine.common import recipe
    from transformer_engine.pytorch.constants import TE_DType

    return SimpleNamespace(pytorch=pytorch, extension=extension, recipe=recipe, dtype=TE_DType)


def need(te: SimpleNamespace, recipe: str) -> None:
    """Skip where this GPU, or this CUDA, has not the units for a recipe."""
    ask = {
        "blockwise": te.pytorch.is_fp8_block_scaling_available,
        "mxfp8": te.pytorch.is_mxfp8_available,
    }.get(recipe, te.pytorch.is_fp8_available)
    available, reason = ask(return_reason=True)
    if not available:
        pytest.skip(f"{recipe}: {reason}")


def numbers(kind: str, dtype: torch.dtype, shape: tuple[int, int] = (320, 384)) -> torch.Tensor:
    """Make rows and columns of very different sizes, with what makes the rules differ."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    x *= 2.0 ** torch.randint(-12, 12, (shape[0], 1), generator=generator)
    x *= 2.0 ** torch.randint(-12, 12, (1, shape[1]), generator=generator)
    if kind == "huge":
        x *= 1e38 / x.abs().amax()
    elif kind == "tiny":
        x *= 1e-38 / x.abs().amax()  # some blocks are subnormal, and their scales overflow
    elif kind == "zero":
        x[:, :200] = 0
    elif kind in ("inf", "nan"):
        x[::97, ::61] = math.inf if kind == "inf" else math.nan
        x[5::97, 3::61] *= -1
    return x.to(dtype).cuda()


def assert_codes(found: fq.Quantised, data: torch.Tensor, what: str) -> None:
    """Compare with TE's uint8 data, naming the first code that differs."""
    ours, theirs = bytes_of(found.codes.cpu()), data.view(found.codes.dtype).cpu()
    differ = (ours != bytes_of(theirs)).nonzero()
    assert not len(differ), (
        f"{what}: {len(differ)} codes differ, first at {differ[0].tolist()}: "
        f"{found.codes.cpu().float()[tuple(differ[0])]}, "
        f"Transformer Engine has {theirs.float()[tuple(differ[0])]}"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fp8", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("dtype", INPUTS, ids=str)
def test_tensorwise(te, dtype, fp8, kind):
    need(te, "tensorwise")
    x = numbers(kind, dtype)
    theirs = te.pytorch.Float8CurrentScalingQuantizer(
        te.dtype[fp8], x.device, rowwise=True, columnwise=False
    )(x)
    rows_e = [len(x)]
    scale_e = fq.scale_from_amax(fq.amax_of_experts(x, rows_e), fp8)
    ours = fq.quantise_experts(x, rows_e, scale_e, fp8)
    assert_codes(ours, theirs._data, "tensorwise")
    assert torch.equal(ours.scale_inv, theirs._scale_inv.flatten())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fp8", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("dtype", INPUTS, ids=str)
def test_delayed_with_a_given_scale(te, dtype, fp8, kind):
    need(te, "delayed")
    x, scale = numbers(kind, dtype), torch.tensor([3.7], device="cuda")
    amax = torch.zeros(1, device="cuda")
    quantizer = te.pytorch.Float8Quantizer(
        scale, amax, te.dtype[fp8], rowwise=True, columnwise=False
    )
    theirs = quantizer(x)
    ours = fq.quantise_experts(x, [len(x)], scale, fp8)
    assert_codes(ours, theirs._data, "delayed")
    assert torch.equal(ours.scale_inv, theirs._scale_inv.flatten())
    assert torch.equal(fq.amax_of_experts(x, [len(x)]), amax)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fp8", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("shape", [(320, 384), (304, 272)], ids=str)
@pytest.mark.parametrize("dtype", INPUTS, ids=str)
def test_blockwise_along_rows_and_columns(te, dtype, shape, fp8, kind):
    need(te, "blockwise")
    x, (rows, columns) = numbers(kind, dtype, shape), shape
    theirs = te.pytorch.Float8BlockQuantizer(
        te.dtype[fp8], rowwise=True, columnwise=True, block_scaling_dim=1
    )(x)
    ours = fq.quantise_tiles(x, (1, 128), fp8, "power_of_two")
    assert_codes(ours, theirs._rowwise_data, "1x128")
    # TE keeps these scales transposed, and pads both kinds for the GEMM.
    assert torch.equal(ours.scale_inv.T, theirs._rowwise_scale_inv[:, :rows])

    ours = fq.quantise_blocks_of_rows(x, [rows], 128, fp8, "power_of_two")
    assert_codes(ours, theirs._columnwise_data.T, "128x1")
    assert torch.equal(ours.scale_inv, theirs._columnwise_scale_inv[:, :columns])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(320, 384), (304, 272)], ids=str)
@pytest.mark.parametrize("dtype", INPUTS, ids=str)
def test_blockwise_weights(te, dtype, shape, kind):
    need(te, "blockwise")
    x = numbers(kind, dtype, shape)
    theirs = te.pytorch.Float8BlockQuantizer(
        te.dtype[E4M3], rowwise=True, columnwise=False, block_scaling_dim=2
    )(x)
    ours = fq.quantise_tiles(x, (128, 128), E4M3, "power_of_two")
    assert_codes(ours, theirs._rowwise_data, "128x128")
    blocks = ours.scale_inv.shape[1]
    assert torch.equal(ours.scale_inv, theirs._rowwise_scale_inv[:, :blocks])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fp8", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("dtype", INPUTS, ids=str)
def test_mxfp8(te, dtype, fp8, kind):
    need(te, "mxfp8")
    x = numbers(kind, dtype)
    rows, columns = x.shape
    theirs = te.pytorch.MXFP8Quantizer(te.dtype[fp8], rowwise=True, columnwise=True)(x)
    ours = fq.quantise_tiles(x, (1, 32), fp8, "e8m0")
    assert_codes(ours, theirs._rowwise_data, "1x32")
    assert torch.equal(ours.scale_inv, theirs._rowwise_scale_inv[:rows, : columns // 32])

    ours = fq.quantise_blocks_of_rows(x, [rows], 32, fp8, "e8m0")
    assert_codes(ours, theirs._columnwise_data, "32x1")
    assert torch.equal(ours.scale_inv, theirs._columnwise_scale_inv[: rows // 32, :columns])


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_delayed_scales_step(te, length, algorithm):
    need(te, "delayed")
    margin = 1
    recipe = Fp8Recipe(
        "delayed", "e4m3", margin=margin, amax_history_len=length, amax_compute_algo=algorithm
    )
    scales = DelayedScales(recipe, 1, "cuda")
    history, scale = torch.zeros(length, 3, device="cuda"), torch.ones(3, device="cuda")
    for amaxes in (
        [3.0, 0.0, 1e-41],
        [0.0, 5.0, 2.0],
        [math.inf, 1.0, 0.0],
        [2.0, math.inf, 7.0],
        [0.3, 0.2, 0.1],
        [1e30, 1e-30, 448.0],
        [0.7, 0.0, 0.0],
    ):
        for slot, amax in zip(("x", "weight", "grad"), amaxes, strict=True):
            scales.record(slot, torch.tensor([amax], device="cuda"))
        scales.end_batch()
        history[0] = torch.tensor(amaxes, device="cuda")
        te.extension.fused_amax_and_scale_update_after_reduction(
            history[0].clone(), [history], [scale], algorithm, te.dtype[E4M3], margin
        )
        assert torch.equal(scales.amax_history[0].T, history), amaxes
        assert torch.equal(scales.scale[0], scale), amaxes


def te_recipe(te: SimpleNamespace, name: str):
    """Return TE's own recipe of that name, with its own defaults."""
    names = {
        "tensorwise": "Float8CurrentScaling",
        "delayed": "DelayedScaling",
        "blockwise": "Float8BlockScaling",
        "mxfp8": "MXFP8BlockScaling",
    }
    return getattr(te.recipe, names[name])()


@pytest.mark.parametrize("name", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_a_grouped_linear_layer_is_imitated(te, name):
    """The scopes of scales, through a whole layer: an expert without rows, others uneven.

    Only accumulation and the bf16 of the result are left to differ. The check is relative: TE must
    be four times nearer to the emulation than to exact arithmetic.
    """
    need(te, name)
    rows_e, d, f = [64, 0, 160, 32], 256, 384
    torch.manual_seed(0)
    layer = te.pytorch.GroupedLinear(
        len(rows_e), d, f, bias=False, params_dtype=torch.bfloat16, device="cuda"
    )
    size_R = 2.0 ** torch.randint(-4, 4, (sum(rows_e), 1), device="cuda")
    x = (torch.randn(sum(rows_e), d, device="cuda") * size_R).bfloat16().requires_grad_()
    grad = torch.randn(sum(rows_e), f, device="cuda", dtype=torch.bfloat16)
    with te.pytorch.autocast(enabled=True, recipe=te_recipe(te, name)):
        out = layer(x, rows_e)
    out.backward(grad)
    weights = [getattr(layer, f"weight{i}") for i in range(len(rows_e))]
    theirs = {
        "out": out,
        "x.grad": x.grad,
        "weight.grad": torch.stack([w.grad for w in weights]),
    }

    emulation = Fp8Emulation(Fp8Recipe(name), len(rows_e), "cuda")
    weight = torch.stack([w.detach() for w in weights])
    rounded = products(
        emulation(x, weight, rows_e),
        emulation.grad_x(grad, weight, rows_e),
        emulation.grad_w(grad, x, rows_e),
        rows_e,
    )
    x32, w32, g32 = x.detach().float(), weight.float(), grad.float()
    exact = products((x32, w32), (g32, w32), (g32, x32), rows_e)
    for what, their in theirs.items():
        near = (rounded[what] - their.float()).norm() / exact[what].norm()
        far = (exact[what] - their.float()).norm() / exact[what].norm()
        assert near < far / 4, f"{what}: {near:.4f} from TE, exact arithmetic is {far:.4f}"


def products(forward, grad_x, grad_w, rows_e: list[int]) -> dict[str, torch.Tensor]:
    """Multiply the operands of a layer's three products, expert by expert, in fp32."""

    def parts(t):
        return t.split(rows_e)

    (x, w), (g, w_back), (g_rows, x_rows) = forward, grad_x, grad_w
    return {
        "out": torch.cat([a @ b.T for a, b in zip(parts(x), w, strict=True)]),
        "x.grad": torch.cat([a @ b for a, b in zip(parts(g), w_back, strict=True)]),
        "weight.grad": torch.stack(
            [a.T @ b for a, b in zip(parts(g_rows), parts(x_rows), strict=True)]
        ),
    }
