"""The precision study: what it compares, what it counts, what it says of it, what it draws."""

import csv
import itertools
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from megatron_moe.config import MoEConfig
from megatron_moe.tools.study import picture, tables
from megatron_moe.tools.study.command import study_command
from megatron_moe.tools.study.compare import Study
from megatron_moe.tools.study.history import Point, Run
from megatron_moe.tools.study.measures import state_bytes
from megatron_moe.tools.study.plan import Plan
from megatron_moe.tools.study.precisions import FULL, PRECISION, PRECISIONS, QUICK, findings

EXAMPLE = Path(__file__).parents[3] / "examples" / "precision_study.py"
SIZES = Plan(steps=40, seeds=3, measurements=4)
ROUTED = {"cv": 0.5, "variance": 0.25, "entropy": 0.9, "drop_rate": 0.0, "mean_k": 2.0}


def made_run(variant, seed, loss, *, skipped=0, cpu=10.0, held=2048):
    points = [Point(step=10 * i, loss=loss + 4 - i, churn=0.2, **ROUTED) for i in range(1, 5)]
    half = PRECISIONS[variant].precision != "fp32"
    return Run(
        variant=variant,
        seed=seed,
        points=tuple(points),
        seconds=99.0,
        cpu_seconds=cpu,
        skipped=skipped,
        state_bytes=18.0 if half else 16.0,
        held_bytes=held,
    )


def made_study(**losses):
    """Three seeds of each variant; names with ``_`` for ``-``."""
    return Study(
        [
            made_run(name.replace("_", "-"), seed, loss)
            for name, of_seeds in losses.items()
            for seed, loss in enumerate(of_seeds, start=1)
        ],
        PRECISION,
    )


def said(study, plan=SIZES):
    return tables.spoken(findings(study, plan))


def test_every_precision_has_its_control_and_options_that_exist():
    ours = {f.name: f for f in fields(MoEConfig)}
    for name, variant in PRECISIONS.items():
        assert variant.name == name and variant.against in PRECISIONS
        assert variant.precision in {"fp32", "bf16", "fp16"}
        assert ours.keys() >= {*variant.moe, *variant.schedule}
        for option, value in variant.moe.items():
            assert value in ours[option].metadata.get("choices", [value])
    recipes = {v.moe["fp8_emulate"] for v in PRECISIONS.values() if "fp8_emulate" in v.moe}
    assert recipes == {*ours["fp8_emulate"].metadata["choices"]} - {"none"}
    assert set(QUICK.chosen) <= set(PRECISIONS) and FULL.seeds == 3
    assert PRECISION.baseline == "fp32"


def test_what_is_compared_with_bf16_brings_it_along_and_fp32_too():
    assert PRECISION.with_controls(["fp8-mxfp8"]) == ["fp32", "bf16", "fp8-mxfp8"]
    assert PRECISION.with_controls(["sparse-no-decay"]) == ["fp32", "sparse", "sparse-no-decay"]


def test_state_is_counted_on_the_storages_shared_ones_once():
    model = torch.nn.Linear(8, 4, bias=False).bfloat16()
    model.register_buffer("mask", torch.ones(4, 8, dtype=torch.bool))
    copy = torch.nn.Parameter(model.weight.detach().float())
    model.weight.main_grad = torch.ones(4, 8)
    copy.grad = model.weight.main_grad.view(-1).view(4, 8)  # the same memory
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4, 8), "exp_avg_sq": copy * 0}
    adam = SimpleNamespace(param_groups=[{"params": [copy]}], state={copy: moments})
    one = SimpleNamespace(optimizer=adam)
    # weight 2, mask 1, fp32 gradient 4, fp32 copy 4, two moments 8, and one number for the step
    expected = 19 + 4 / 32
    assert state_bytes(model, one) == expected
    assert state_bytes(model, SimpleNamespace(chained_optimizers=[one])) == expected


def test_changes_are_in_percent_and_seed_by_seed():
    study = made_study(bf16=[4.0, 5.0, 6.0], fp8_blockwise=[4.04, 5.05, 6.06], fp32=[4.0, 5.0, 6.0])
    text = said(study)
    line = (
        "fp8-blockwise: loss +1.00 ± 0.00 % against bf16: worse; loss +1.00 ± 0.00 % against fp32"
    )
    assert line in text
    assert (
        "Furthest from bf16: fp8-blockwise, by at most 1.00%, its interval counted, so all" in text
    )


@pytest.mark.parametrize(
    ("fp8", "kept"), [([4.08] * 3, "not all"), ([3.9] * 3, "not all"), ([3.99, 4.0, 4.01], "all")]
)
def test_two_percent_counts_the_interval_and_both_sides(fp8, kept):
    text = said(made_study(fp32=[4.0] * 3, bf16=[4.0] * 3, fp8_delayed=fp8))
    words = "so not all are shown to stay within 2%" if kept == "not all" else "so all stay within"
    wide = said(made_study(fp32=[4.0] * 3, bf16=[4.0] * 3, fp8_delayed=[3.9, 4.0, 4.1]))
    assert words in text
    assert "so not all are shown" in wide, "a mean of zero, but an interval of 6 %"


def test_skipped_updates_and_memory_are_told():
    runs = [made_run("fp32", s, 4.0, held=4096) for s in (1, 2)]
    runs += [made_run("bf16", s, 4.0) for s in (1, 2)]
    runs += [made_run("fp16", s, 4.0, skipped=s, cpu=30.0) for s in (1, 2)]
    text = said(Study(runs, PRECISION))
    assert "of 40 updates 1.5 skipped for what fp16 cannot hold" in text
    assert "  · fp32: 16.00 bytes a parameter stay; one MoE layer keeps 4 KiB" in text
    assert "  · bf16, fp16: 18.00 bytes a parameter stay; one MoE layer keeps 2 KiB" in text
    assert "CPU time of a run over that of fp32: bf16 1.00, fp16 3.00" in text
    assert "not how fast it is" in text


def test_one_seed_claims_nothing():
    losses = {"fp32": 4.0, "bf16": 4.4, "fp8-mxfp8": 4.4}
    study = Study([made_run(name, 1, loss) for name, loss in losses.items()], PRECISION)
    text = said(study, Plan(seeds=1))
    assert "Furthest from bf16: fp8-mxfp8, by 0.00% with this one seed\n" in text
    assert "bf16: loss +10.00 % against fp32: one seed cannot tell it from noise" in text
    assert "±" not in text and "Worse" not in text


def test_sparse_is_held_against_dense_and_without_decay_against_with():
    text = said(made_study(fp32=[4.0] * 3, sparse=[4.2] * 3, sparse_no_decay=[4.2] * 3))
    assert "sparse: loss +5.00 ± 0.00 % against fp32: worse\n" in text
    assert "sparse-no-decay: loss +5.00 ± 0.00 % against fp32: worse; loss +0.00 ± 0.00 %" in text
    assert "sparse-no-decay made exactly the runs of sparse" in text


def test_table_and_picture_hold_no_router_s_measures(tmp_path):
    study = made_study(fp32=[4.0, 4.1, 4.2], bf16=[4.1, 4.1, 4.1], fp8_mxfp8=[4.0, 4.1, 4.0])
    console = Console(width=180, record=True, file=(tmp_path / "log").open("w"))
    console.print(tables.console_table(study, SIZES))
    shown = console.export_text()
    assert "3 precisions" in shown and "% over bf16" in shown and "CPU time" in shown
    tables.write_csv(tmp_path / "table.csv", study, SIZES)
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["variant"] for row in rows] == study.names
    assert float(rows[2]["loss_change_from_bf16"]) == pytest.approx(-0.0163, abs=1e-4)
    picture.draw(study, SIZES, [tmp_path / "a.svg"])
    drawn = (tmp_path / "a.svg").read_text()
    for panel in PRECISION.panels:
        assert f">{panel.title}<" in drawn
    for text, word in itertools.product((shown, drawn, ",".join(rows[0])), ("churn", "cv")):
        assert word not in text


def test_a_panel_without_what_it_compares_with_is_left_out(tmp_path):
    picture.draw(made_study(fp32=[4.0] * 3, sparse=[4.1] * 3), SIZES, [tmp_path / "a.svg"])
    drawn = (tmp_path / "a.svg").read_text()
    assert "against that of fp32" in drawn and "against that of bf16" not in drawn


def test_the_command_knows_its_own_variants_and_folder():
    command = study_command(PRECISION)
    assert command.name == "precision-study"
    result = CliRunner().invoke(command, ["--variants", "topk"])
    assert result.exit_code == 2
    assert "topk: not one of fp32, bf16, fp16" in result.output
    assert "runs/precision_study" in CliRunner().invoke(command, ["--help"]).output


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tiny_study_of_precisions_runs_to_its_picture(tmp_path):
    words = ["--variants", "fp16,fp8-delayed,sparse-late", "--steps", "8", "--out", tmp_path]
    made = subprocess.run(
        [sys.executable, EXAMPLE, "--quick", *words],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    runs = {
        run["variant"]: run for run in json.loads((tmp_path / "study.json").read_text())["runs"]
    }
    assert set(runs) == {"fp32", "bf16", "fp16", "fp8-delayed", "sparse-late"}
    first = [run["points"][0]["loss"] for run in runs.values()]
    assert max(first) - min(first) < 0.05, "equal weights and text, but for rounding"
    assert len(set(first)) == len(first) - 1, "before its start sparse-late is fp32, bit for bit"
    for run in runs.values():
        assert run["points"][-1]["loss"] < run["points"][0]["loss"]
        assert run["skipped"] < 8
    state = {name: round(run["state_bytes"], 1) for name, run in runs.items()}
    assert state["fp32"] == 16.0 and state["bf16"] == state["fp16"] == state["fp8-delayed"] == 18.0
    assert 16.0 < state["sparse-late"] < 17.0
    held = {name: run["held_bytes"] for name, run in runs.items()}
    assert held["bf16"] < 0.6 * held["fp32"] < held["fp32"] < held["sparse-late"]
    assert (tmp_path / "picture.png").stat().st_size > 0
