"""The experts benchmark: workloads, the rule that fills the table of forms, the count of bytes."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from megatron_moe.experts import form_table
from megatron_moe.experts.form_table import DEFAULT, TABLE, Fastest, fastest
from megatron_moe.experts.forms import FORMS
from megatron_moe.tools.bench import child, experts, form_choice, memory
from megatron_moe.tools.bench.experts_case import WORKLOADS, Point, points_of
from megatron_moe.tools.bench.experts_process import too_padded
from megatron_moe.tools.bench.live_bytes import REST, LiveBytes

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("workload", WORKLOADS)
def test_workloads_are_what_they_are_called(workload):
    rows_e = WORKLOADS[workload](1024, 8)
    assert rows_e == WORKLOADS[workload](1024, 8), "drawn alike on every run"
    assert len(rows_e) == 8
    assert sum(rows_e) == 1024 or workload == "few"
    held = {
        "balanced": len(set(rows_e)) > 1 and max(rows_e) < 1.3 * 128,
        "hot": rows_e[0] == 512 and max(rows_e[1:]) < 512 / 4,
        "zipf": rows_e[0] > 300 > 100 > rows_e[-1],
        "padded": set(rows_e) == {128},
        "few": min(rows_e) >= 4 and max(rows_e) <= 16,
    }
    assert held[workload]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_points_have_the_mean_and_the_padding_they_name(device):
    for point in points_of(device):
        rows_e = point.rows_e()
        assert (len(rows_e), sum(rows_e)) == (point.num_experts, point.rows * point.num_experts)
        assert max(rows_e) == point.rows * point.padding
        assert min(rows_e) >= 0


def _found(rows, padding, batched, *, elements=100, loop=2.0):
    seconds = {"grouped_mm": 1.0, "loop": loop, "batched": batched}
    sizes = {"elements": elements, "num_experts": 2, "rows": rows, "padding": padding}
    return {"device": "cpu", "dtype": "float32", "seconds": seconds} | sizes


def test_a_form_is_chosen_only_where_it_won_in_every_process():
    clear = [_found(4, 1.0, 0.5), _found(16, 1.0, 0.9), _found(64, 1.0, 0.8)]
    once_slower = [*clear[:1], _found(16, 1.0, 1.01), *clear[2:]]
    in_the_noise = [*clear[:1], _found(16, 1.0, 0.96), *clear[2:]]
    assert form_choice.findings([clear] * 3) == (
        Fastest("cpu", "float32", 100, 64, 1.0, "batched"),
    )
    # 64 rows hold 16 rows too, where it was not faster: they are no finding either.
    four = (Fastest("cpu", "float32", 100, 4, 1.0, "batched"),)
    assert form_choice.findings([clear, once_slower, clear]) == four
    assert form_choice.findings([clear, clear, in_the_noise]) == four


def test_findings_are_the_largest_rows_best_first():
    points = [
        _found(4, 1.0, 0.25),
        _found(4, 2.0, 0.5),
        _found(16, 1.0, 0.9),
        _found(16, 2.0, 1.5, loop=0.9),
        _found(4, 1.0, 1.2, elements=200),
    ]
    assert form_choice.findings([points]) == (
        Fastest("cpu", "float32", 100, 4, 2.0, "batched"),
        Fastest("cpu", "float32", 100, 16, 1.0, "batched"),
    )


def test_only_the_rows_of_the_device_are_written_anew():
    source = form_choice.TABLE_FILE.read_text()
    cpu = [row for row in TABLE if row.device == "cpu"]
    assert form_choice.written(source, cpu, "cpu") == source, "as the tool writes it"
    with_cuda = form_choice.written(source, [replace(cpu[0], device="cuda")], "cuda")
    assert with_cuda.count('Fastest("cuda", ') == 1
    assert with_cuda.count('Fastest("cpu", ') == len(cpu)
    nothing = form_choice.written(with_cuda, [], "cpu")
    assert "TABLE: tuple[Fastest, ...] = ()\n" in nothing
    with pytest.raises(ValueError, match=r"^the source has 0 tables of forms instead of one$"):
        form_choice.written("TABLE = ()", [], "cpu")


def test_the_committed_table_is_legal():
    assert TABLE, "measured on a CPU"
    assert len(set(TABLE)) == len(TABLE)
    for row in TABLE:
        assert row.device in ("cpu", "cuda")
        assert row.dtype in ("float32", "bfloat16")
        assert row.form in FORMS and row.form != DEFAULT
        assert row.most_elements > 0 and row.most_rows > 0 and row.most_padding >= 1


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.dtype}-{row.most_elements}")
def test_the_committed_table_is_taken_up_to_its_edges(row):
    rows_e = Point(1, row.most_elements, 8, row.most_rows, row.most_padding).rows_e()
    dtype = getattr(torch, row.dtype)
    assert fastest(row.device, dtype, row.most_elements, rows_e)[0] == row.form
    assert fastest(row.device, torch.float64, row.most_elements, rows_e)[0] == DEFAULT
    beyond = max(r.most_rows for r in TABLE) + 1
    assert fastest(row.device, dtype, row.most_elements, [beyond] * 8)[0] == DEFAULT
    beyond = max(r.most_elements for r in TABLE) + 1
    assert fastest(row.device, dtype, beyond, rows_e)[0] == DEFAULT


@pytest.mark.parametrize(
    ("dtype", "elements", "rows_e", "form"),
    [
        (BF16, 100, [4, 4], "batched"),
        (BF16, 100, [5, 3], "batched"),
        (BF16, 100, [6, 2], "grouped_mm"),  # padded by 1.5
        (BF16, 100, [5, 4], "loop"),  # 4.5 rows in the mean: the second row of the table
        (BF16, 100, [9, 9], "grouped_mm"),
        (BF16, 101, [4, 4], "loop"),
        (BF16, 201, [4, 4], "grouped_mm"),
        (FP32, 100, [4, 4], "grouped_mm"),
        (BF16, 100, [0, 0], "grouped_mm"),
        (BF16, 100, [4], "batched"),
        (BF16, 100, [0], "grouped_mm"),
        (BF16, 100, [8, 0], "grouped_mm"),
    ],
    ids=str,
)
def test_the_first_row_that_holds_is_taken(monkeypatch, dtype, elements, rows_e, form):
    rows = (
        Fastest("cpu", "bfloat16", 100, 4, 1.25, "batched"),
        Fastest("cpu", "bfloat16", 200, 8, 1.25, "loop"),
    )
    monkeypatch.setattr(form_table, "TABLE", rows)
    assert fastest("cpu", dtype, elements, rows_e)[0] == form
    assert fastest("cuda", dtype, elements, rows_e)[0] == "grouped_mm"


def test_padding_is_too_much_beyond_eight_times_the_rows():
    assert not too_padded([8] + [0] * 7)
    assert too_padded([8] + [0] * 8)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--update-table", "--quick"], "--update-table wants 3 processes at least"),
        (["--update-table", "--processes", "2"], "--update-table wants 3 processes at least"),
        (["--shapes", "seed,gpt5"], "gpt5: not one of seed, mixtral/16, olmoe/8, qwen3-30b/8, "),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, said):
    result = CliRunner().invoke(experts.main, arguments)
    assert result.exit_code == 2
    assert said in result.output


def test_a_process_refuses_an_allocator_that_is_not_pinned(monkeypatch):
    for name, value in child.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    child.refuse_unpinned("experts.py")
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    with pytest.raises(RuntimeError) as error:
        child.refuse_unpinned("experts.py")
    assert str(error.value) == (
        "MALLOC_TRIM_THRESHOLD_ must be set before Python starts: use experts.py"
    )


def test_live_bytes_count_each_storage_while_it_lives():
    before = torch.zeros(100)
    with LiveBytes() as meter:
        before.mul_(2).view(10, 10)
        assert meter.live == 0, "no storage was made"
        a = torch.ones(8)
        view = a[2:4]
        assert meter.live == 32
        del a
        assert meter.live == 32, "the view still holds it"
        del view
        assert (meter.live, meter.peak) == (0, 32)
        meter.reset_peak()
        torch.ones(4) + torch.ones(4)
        assert (meter.live, meter.peak) == (0, 48)


def test_live_bytes_know_what_is_held_for_backward_and_by_whom():
    x = torch.ones(8, requires_grad=True)
    x.grad = torch.zeros(8)

    def phase(x):
        return (x.exp() + torch.ones(8)).sin()  # backward needs exp's result and sin's input

    with LiveBytes() as meter:
        y = meter.around("phase", phase)(x)
        loss = y.sum()
        del y
        assert dict(meter.by_phase) == {"phase": 64, REST: 4}
        assert meter.rises["phase"] == 32 * 3, "exp, ones or sin, and their sum"
        meter.reset_peak()
        with meter.phase("backward"):
            loss.backward()
        assert meter.peak > 64 + 4
        assert meter.by_phase["phase"] == 0, "freed with the graph"
    assert x.grad.count_nonzero() == 8


def test_a_phase_within_backward_belongs_to_backward():
    with LiveBytes() as meter, meter.phase("backward"):
        kept = meter.around("experts", torch.ones)(8)
    assert meter.by_phase == {"backward": kept.nbytes}


def _account(held, peak, seconds):
    return {
        "held": {"experts": held << 20},
        "rises": {"experts": 1 << 20},
        "forward_peak": held << 20,
        "backward_peak": peak << 20,
        "seconds": seconds,
    }


def test_settings_are_shown_with_what_they_save_and_cost():
    run = {"nothing": _account(80, 100, 2.0), "every 4 layers": _account(8, 30, 3.0)}
    with (console := Console(width=200)).capture() as capture:
        console.print(memory.setting_table([run, run]))
    row = next(line for line in capture.get().splitlines() if "every 4 layers" in line)
    for cell in ("8.0", "90%", "30.0", "70%", "1.50 (1.50–1.50)", "--recompute-num-layers 4"):
        assert cell in row
    assert "70% of the peak" in memory.claim(run, 8)
    assert memory.claim(run, 8).endswith("the claim holds here")
    run["every 4 layers"] = _account(8, 50, 3.0)
    assert memory.claim(run, 8).endswith("the claim does not hold here")


@pytest.mark.slow
def test_one_shape_from_end_to_end(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--quick", "--shapes", "mixtral/16", "--rounds", "1", "--json", str(out)]
    result = CliRunner().invoke(experts.main, arguments)
    assert result.exit_code == 0, result.output
    assert "TE grouped: not measured, Transformer Engine runs on CUDA only" in result.output
    (run,) = json.loads(out.read_text())["processes"]
    assert {(c["dtype"], c["workload"]) for c in run["stages"]} == {
        (dtype, workload) for dtype in ("fp32", "bf16") for workload in WORKLOADS
    }
    for case in run["stages"]:
        assert {"upstream", "limit", "auto", "sequential"} <= case["seconds"].keys()
        assert max(case["differences"].values()) < (1e-4 if case["dtype"] == "fp32" else 3e-2)


@pytest.mark.slow
def test_memory_account_from_end_to_end(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--quick", "--rounds", "1", "--json", str(out)]
    result = CliRunner().invoke(memory.main, arguments)
    assert result.exit_code == 0, result.output
    (run,) = json.loads(out.read_text())["processes"]
    held = {name: memory.held(account) for name, account in run.items()}
    order = ["nothing", "activation", "experts", "MoE layer", "every layer", "every 4 layers"]
    assert sorted(order, key=held.get, reverse=True) == order
    assert run["experts"]["held"].get("experts", 0) < run["nothing"]["held"]["experts"] / 10
