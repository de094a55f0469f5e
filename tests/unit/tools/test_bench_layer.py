"""The layer benchmark: fair turns, exact counts, and what it refuses."""

import json

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_moe.tools.bench import clock, layer, process, tables
from megatron_moe.tools.bench.held import held_bytes
from megatron_moe.tools.bench.limit import matmul_limit
from megatron_moe.tools.bench.phases import Stage, timed_step
from megatron_moe.tools.bench.shapes import SHAPES, Shape, minimum_held_bytes
from megatron_moe.tools.bench.traffic import counted


def test_steps_take_turns_and_the_fastest_counts():
    now, done = 0.0, []
    costs = {"a": iter([3.0, 1.0, 2.0]), "b": iter([5.0, 6.0, 4.0])}

    def step(name):
        def run():
            nonlocal now
            done.append(name)
            now += next(costs[name])

        return run

    best = clock.fastest_in_turns({"a": step("a"), "b": step("b")}, 3, lambda: now)
    assert best == {"a": 1.0, "b": 4.0}
    assert done == ["a", "b"] * 3


@pytest.mark.parametrize(
    ("name", "mib"), [("seed", 72.1), ("olmoe/8", 20.4), ("qwen3-30b/8", 16.4), ("dsv3/28", 12.4)]
)
def test_minimum_bytes_are_the_published_ones(name, mib):
    assert minimum_held_bytes(SHAPES[name], "fp32", gated=False) / 2**20 == pytest.approx(
        mib, abs=0.05
    )


class _Keeper(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, aside):
        ctx.aside = [aside]
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2, None


class _Holds(nn.Module):
    """Saves x (8 floats, as two views), an intermediate (8 floats) and 5 int64 on a context."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))

    def forward(self, x):
        squared = (x[:4] * x[4:]).repeat(2)
        return (_Keeper.apply(squared, torch.arange(5)) + self.weight.sum(),)


def test_held_bytes_count_each_storage_once_and_no_parameter():
    x = torch.randn(8).requires_grad_()
    assert held_bytes(_Holds(), x) == 8 * 4 + 8 * 4 + 5 * 8


def test_stages_one_by_one_give_the_whole_gradient():
    x = torch.randn(3, 4).requires_grad_()
    grad = torch.randn(3, 4)
    weight = torch.randn(4, 4).requires_grad_()
    stages = [
        Stage("route", lambda v: {"scale": v["x"].sum(1, keepdim=True).sigmoid(), "count": 7}),
        Stage("permute", lambda v: {"rows": v["x"] @ weight}),
        Stage("exchange", lambda v: {"rows": v["rows"]}),
        Stage("combine", lambda v: {"y": v["rows"] * v["scale"] * v["count"]}),
    ]
    ticks = iter(range(100))
    times = list(timed_step(stages, x, grad, lambda: float(next(ticks))))
    found = x.grad, weight.grad
    expected = torch.autograd.grad(
        (x @ weight) * x.sum(1, keepdim=True).sigmoid() * 7, (x, weight), grad
    )
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    forward = [((place, "forward"), 1.0) for place in range(4)]
    assert times == forward + [((place, "backward"), 1.0) for place in (3, 2, 1, 0)]


class _Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.out:
            (m, k), n = args[0].shape, args[1].shape[1]
            self.flops += 2 * m * k * n
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gated", [False, True])
def test_limit_does_every_product_of_a_step_and_no_more(gated):
    shape = Shape("tiny", hidden=8, ffn=4, num_experts=3, topk=1, goals={})
    step = matmul_limit(shape, torch.float32, [5, 0, 2], gated=gated)
    with _Products() as products:
        step()
    gate = 2 * 4096 * 8 * 3
    experts = 2 * 7 * 8 * 4 * (3 if gated else 2)
    assert products.flops == 3 * (gate + experts)


def _traffic_of_known_calls(world):
    with counted() as traffic:
        x = torch.zeros(6)
        dist.all_to_all_single(torch.empty(6), x)
        dist.all_gather_into_tensor(torch.empty(4, dtype=torch.int64), torch.zeros(2).long())
        dist.all_reduce(torch.zeros(3, dtype=torch.bfloat16))
        dist.all_reduce(
            torch.zeros(3), group=dist.new_group([world.rank], use_local_synchronization=True)
        )
    before = dict(traffic.calls)
    dist.all_reduce(torch.zeros(3))
    return before, dict(traffic.calls), dict(traffic.bytes)


def test_collectives_among_two_ranks_are_counted_with_their_bytes(torch_pool):
    for before, after, sent in torch_pool.run(_traffic_of_known_calls, world_size=2):
        assert after == before == {"all-to-all": 1, "all-gather": 1, "all-reduce": 1}
        assert sent == {"all-to-all": 24, "all-gather": 16, "all-reduce": 6}


@pytest.mark.parametrize(
    ("ratio", "said"), [(1.5, "met"), (1.45, "met"), (1.40, "in the noise"), (1.2, "missed")]
)
def test_verdict_leaves_room_for_noise_only(ratio, said):
    assert said in tables.verdict(ratio, 1.45)


def _case(seconds):
    return {
        "shape": "olmoe/8",
        "dtype": "bf16",
        "seconds": dict(zip(("upstream", "ours", "limit"), seconds, strict=True)),
        "differences": {"ours": 4e-3},
    }


def test_table_shows_the_median_ratio_and_its_spread():
    runs = [[_case(s)] for s in ((0.3, 0.2, 0.1), (0.32, 0.2, 0.1), (0.26, 0.2, 0.1))]
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(tables.speed_table(runs, "bf16", gated=False))
    row = next(line for line in capture.get().splitlines() if "olmoe/8" in line)
    for cell in ("300.0", "200.0", "100.0", "1.50", "1.30–1.60", "0.50", "≥ 1.40", "met", "4e-03"):
        assert cell in row


def test_sides_that_differ_are_not_timed():
    with pytest.raises(ValueError) as error:
        process.refuse_if_different({"ours": 1e-7, "ours, sequential": 0.2}, "seed", "fp32", 1e-4)
    assert str(error.value) == (
        "seed fp32: outputs or gradients of 'ours, sequential' differ from upstream's by 2.0e-01 "
        "of their largest value, more than 1e-04; not timed"
    )
    with pytest.raises(ValueError, match=r"differ from upstream's by nan"):
        process.refuse_if_different({"ours": float("nan")}, "seed", "fp32", 1e-4)


def test_process_refuses_an_allocator_that_is_not_pinned(tmp_path, monkeypatch):
    job = {"shapes": [], "dtypes": [], "rounds": 1, "phase_rounds": 1}
    (tmp_path / "teams").write_text(json.dumps([[job]]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "8589934592")
    with pytest.raises(RuntimeError) as error:
        process.main(tmp_path)
    assert str(error.value) == (
        "MALLOC_MMAP_THRESHOLD_ must be set before Python starts: use layer.py"
    )


def test_unknown_shape_is_named_with_the_known_ones():
    result = CliRunner().invoke(layer.main, ["--shapes", "seed,gpt5"])
    assert result.exit_code == 2
    assert "gpt5: not one of seed, mixtral/16, olmoe/8, qwen3-30b/8, dsv3/28" in result.output


@pytest.mark.slow
def test_one_shape_from_end_to_end(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--quick", "--shapes", "mixtral/16", "--dtypes", "bf16", "--rounds", "1", "--json"]
    result = CliRunner().invoke(layer.main, [*arguments, str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    (case,) = found["processes"][0]
    assert 0 < case["seconds"]["limit"] < case["seconds"]["ours"]
    assert 0 < case["differences"]["ours"] < 3e-2
    assert case["held"]["minimum"] < case["held"]["ours"]
    traffic = found["traffic"][0]["traffic"]
    assert traffic["ours"]["calls"] == {"all-to-all": 4, "all-gather": 1}
    assert traffic["upstream"]["calls"] == {"all-to-all": 6, "all-gather": 1}
    assert traffic["ours"]["bytes"] == traffic["upstream"]["bytes"]
