"""The routing study: what it measures, what it says of it, what it draws; and one tiny run."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from megatron_moe.config import MoEConfig
from megatron_moe.route.decision import Routing
from megatron_moe.tools.study import kept, measures, picture, tables, watch
from megatron_moe.tools.study.command import asked_plan, study_command
from megatron_moe.tools.study.compare import Estimate, Study, estimate, outcome
from megatron_moe.tools.study.files import written_whole
from megatron_moe.tools.study.findings import loss_verdict, signed
from megatron_moe.tools.study.history import Point, Run
from megatron_moe.tools.study.plan import Plan
from megatron_moe.tools.study.routing import FULL, QUICK, ROUTING, findings
from megatron_moe.tools.study.text import cut
from megatron_moe.tools.study.variants import BASELINE, VARIANTS

EXAMPLE = Path(__file__).parents[3] / "examples" / "routing_study.py"
FAMILIES = ("choice", "balance", "capacity", "stability")
SIZES = Plan(steps=40, seeds=3, measurements=4)


def made_run(variant, seed=1, *, loss=4.0, variance=0.25, churn=0.2, drop=0.0, mean_k=2.0):
    """Four measurements; the first half is different, so that only the second can be reported."""
    late = {"variance": variance, "cv": variance**0.5, "drop_rate": drop, "mean_k": mean_k}
    early = {"variance": 9.0, "cv": 3.0, "drop_rate": 0.5, "mean_k": 3.0}
    points = []
    for i in range(4):
        measured = late if i >= 2 else early
        changed = None if i == 0 else churn if i >= 2 else 0.9
        loss_now = loss + (3 - i) + 0.001 * seed
        points.append(
            Point(
                step=10 * (i + 1),
                loss=loss_now,
                entropy=0.9,
                churn=changed,
                context_churn=churn / 2,
                **measured,
            )
        )
    rest = {"cpu_seconds": 1.0, "skipped": 0, "state_bytes": 16.0, "held_bytes": 1024}
    return Run(variant=variant, seed=seed, points=tuple(points), seconds=1.0, **rest)


def made_study(**by_variant):
    """Three seeds of each variant; names with ``_`` for ``-``."""
    return Study(
        [
            made_run(name.replace("_", "-"), seed, **{k: v[seed - 1] for k, v in values.items()})
            for name, values in by_variant.items()
            for seed in (1, 2, 3)
        ],
        ROUTING,
    )


def said(study, plan=SIZES):
    return tables.spoken(findings(study, plan))


# What is compared


def test_every_variant_has_its_control_and_options_that_exist():
    ours = {f.name for f in fields(MoEConfig)}
    for name, variant in VARIANTS.items():
        assert variant.name == name and variant.family in FAMILIES
        assert variant.against in VARIANTS
        assert variant.unbalanced in {"", *VARIANTS}
        assert ours >= {*variant.moe, *variant.schedule}
    assert set(QUICK.chosen) <= set(VARIANTS)
    assert ROUTING.families == FAMILIES and ROUTING.baseline == BASELINE
    assert {VARIANTS[name].family for name in QUICK.chosen} == set(FAMILIES)


def test_controls_come_along_and_controls_of_controls():
    assert ROUTING.with_controls(["bias-sign"]) == [BASELINE, "none", "sigmoid-none", "bias-sign"]
    assert ROUTING.with_controls(["noise", "hash"]) == [BASELINE, "hash", "none", "noise"]


def test_a_row_holds_a_family_and_what_it_is_compared_with():
    names = [BASELINE, "switch", "none", "kl", "noise"]
    assert ROUTING.row_of("balance", names) == [BASELINE, "none", "kl"]
    assert ROUTING.row_of("stability", names) == [BASELINE, "noise"]
    assert ROUTING.row_of("capacity", names) == []


def test_the_user_s_options_change_the_plan():
    plan = asked_plan(ROUTING, FULL, ("kl",), 7, 5)
    assert (plan.chosen, plan.steps, plan.seeds) == ((BASELINE, "none", "kl"), 7, 5)
    assert plan.measured_steps() == [1, 2, 3, 4, 5, 6, 7]
    assert asked_plan(ROUTING, FULL, None, None, None).chosen == tuple(VARIANTS)


def test_last_step_is_measured_whatever_the_numbers():
    assert Plan(steps=100, measurements=4).measured_steps() == [25, 50, 75, 100]
    assert Plan(steps=10, measurements=3).measured_steps() == [1, 4, 7, 10]


# What is measured


def chosen_map(indices_TK, kept_TK, num_experts):
    return Routing(indices_TK, torch.ones(indices_TK.shape), num_experts, kept_TK).dense()[1]


def test_churn_is_the_share_of_choices_that_changed():
    both = torch.tensor([[0, 1], [2, 3]])
    before = chosen_map(both, None, 4)
    assert measures.churn(before, before) == 0.0
    one_of_four = chosen_map(torch.tensor([[1, 0], [2, 1]]), None, 4)
    assert measures.churn(before, one_of_four) == 0.25
    nobody = chosen_map(both, torch.zeros(2, 2, dtype=torch.bool), 4)
    assert measures.churn(nobody, nobody) == 0.0
    assert measures.churn(before, nobody) == 1.0


def test_churn_of_repeated_contexts_compares_with_the_last_decision():
    contexts = watch.ContextChurn(2)
    one, other = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    contexts.add(torch.tensor([7]), one)
    assert contexts.take() is None, "nothing was read twice"
    contexts.add(torch.tensor([7, 8]), torch.cat([one, other]))
    assert contexts.take() == 0.0
    contexts.add(torch.tensor([7, 8]), torch.cat([other, other]))
    assert contexts.take() == 0.5
    contexts.add(torch.tensor([7, 7]), torch.cat([one, other]))
    contexts.add(torch.tensor([7]), other)
    assert contexts.take() == pytest.approx(1 / 3), "the last of a batch is remembered"
    contexts.add(torch.tensor([7 + 2**16]), other)
    contexts.add(torch.tensor([7]), other)
    assert contexts.take() is None, "another context took the slot"


def test_the_watch_tells_training_from_evaluation():
    class Router(torch.nn.Module):
        def forward(self, indices_TK):
            return Routing(indices_TK, torch.ones_like(indices_TK), 4)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.router = Router()

        def forward(self, ids_BS, indices_TK):
            return self.router(indices_TK)

    model = Model()
    seen = watch.RouterWatch(model, [model.router], 4)
    ids = torch.tensor([[1, 2], [1, 3]])  # sequence-major: 1 1 2 3
    model.eval()
    model(ids, torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]]))
    assert seen.probe_churn() is None
    model(ids, torch.tensor([[0, 1], [0, 1], [2, 3], [2, 1]]))
    assert seen.probe_churn() == pytest.approx(1 / 8)
    assert seen.context_churn() is None
    model.train()
    model(ids, torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]]))
    model(torch.tensor([[1, 3]]), torch.tensor([[0, 2], [2, 3]]))
    assert seen.context_churn() == pytest.approx(1 / 4)


def test_places_without_a_choice_are_not_chosen():
    indices = torch.tensor([[0, 1], [1, 0]])
    kept_TK = torch.tensor([[True, False], [True, True]])
    found = chosen_map(indices, kept_TK, 3)
    assert found.tolist() == [[True, False, False], [True, True, False]]


def test_load_is_the_mean_over_steps_not_the_load_of_the_sum():
    meter = measures.LoadMeter()
    for load in ([6, 2], [2, 6]):  # even in the sum, uneven in each step
        meter.add(torch.tensor(load), torch.tensor([1, 0]), 4)
    means = meter.means()
    assert means["cv"] == pytest.approx(0.5) and means["variance"] == pytest.approx(0.25)
    assert means["entropy"] == pytest.approx(0.8113, abs=1e-4)
    assert means["drop_rate"] == 2 / 16 and means["mean_k"] == 2.0


def test_chance_variance_is_that_of_random_distinct_choices():
    plan = Plan(experts=8, topk=2, micro_batch=4, num_micro_batches=1, seq_length=16)
    scores = torch.rand(4000, 64, 8, generator=torch.Generator().manual_seed(0))
    chosen = scores.topk(2, dim=-1).indices.flatten(1)
    loads = torch.stack([torch.bincount(row, minlength=8) for row in chosen]).double()
    relative = loads / loads.mean(1, keepdim=True)
    assert relative.var(1, correction=0).mean() == pytest.approx(plan.chance_variance, rel=0.2)


def test_text_is_cut_so_that_validation_is_never_trained_on():
    plan = Plan(seq_length=4, validation_sequences=3, steps=5)
    text = cut(torch.arange(5 * 40 + 2), plan)
    assert text.validation.shape == (3, 5)
    assert int(text.training.max()) < int(text.validation.min())
    one, same, other = (text.batches(plan, seed) for seed in (1, 1, 2))
    assert len(one) == 5 and all(batch.shape == (8, 5) for batch in one)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="the text has 3 sequences of 4 tokens, and 3 are wanted"):
        cut(torch.arange(15), Plan(seq_length=4, validation_sequences=3))


# What is said of it


def test_estimates_are_student_s():
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert estimate([5.0]) == Estimate(5.0, None)
    assert [Estimate(1.0, half).sign for half in (None, 0.5, 1.5)] == [0, 1, 0]
    assert Estimate(-1.0, 0.5).sign == -1


def test_outcome_is_the_last_loss_and_the_second_half_of_all_else():
    run = made_run(BASELINE, loss=4.0, variance=0.25, churn=0.2, drop=0.1)
    found = outcome(run, (*ROUTING.measures, "state_bytes"))
    assert found["loss"] == pytest.approx(4.001)
    assert (found["variance"], found["cv"], found["drop_rate"]) == (0.25, 0.5, 0.1)
    assert found["churn"] == pytest.approx(0.2) and found["mean_k"] == 2.0
    assert found["state_bytes"] == 16.0, "of the run, not of its points"


def test_what_was_not_measured_is_no_number_and_on_no_side():
    short = made_run(BASELINE)
    short = replace(short, points=(replace(short.points[0], churn=None, context_churn=None),))
    assert math.isnan(outcome(short, ROUTING.measures)["churn"])
    study = Study(
        [replace(short, variant=name, seed=s) for name in ("topk", "noise") for s in (1, 2)],
        ROUTING,
    )
    assert study.difference("noise", "topk", "churn").sign == 0
    assert "churn on the probe nan% without, nan% with" in said(study)


def test_differences_are_taken_seed_by_seed():
    study = made_study(topk={"loss": [4.0, 5.0, 6.0]}, none={"loss": [4.1, 5.1, 6.1]})
    difference = study.difference("none", BASELINE, "loss")
    assert difference.mean == pytest.approx(0.1) and difference.half < 1e-9
    assert study.measured("none", "loss").half > 1.0


def test_cut_of_the_variance_is_computed_and_held_against_the_claim():
    study = made_study(topk={"variance": [0.10, 0.11, 0.09]}, none={"variance": [1.0, 1.0, 1.0]})
    text = said(study)
    assert "topk: 90.0 ± 2.5 % less variance than none (1.0000 → 0.1000)" in text
    assert "Claimed in the literature: 65%, and here it is more" in text
    less = said(made_study(topk={"variance": [0.9] * 3}, none={"variance": [1.0] * 3}))
    assert "topk: 10.0 ± 0.0 % less" in less and "and here it is less" in less
    within = said(made_study(topk={"variance": [0.2, 0.4, 0.5]}, none={"variance": [1.0] * 3}))
    assert "which these runs agree with" in within


def test_stability_is_told_with_and_without():
    study = made_study(
        topk={"churn": [0.20, 0.21, 0.19], "loss": [4.0, 4.0, 4.0]},
        noise={"churn": [0.10, 0.11, 0.09], "loss": [4.0, 4.3, 3.8]},
    )
    text = said(study)
    assert "churn on the probe 20.0% without, 10.0% with (-10.0 ± 0.0 points: calmer)" in text
    assert "in repeated contexts 10.0% without, 5.0% with (-5.0 ± 0.0 points: calmer)" in text
    assert "loss 4.0020 without, 4.0353 with" in text and "not told from noise" in text


@pytest.mark.parametrize(
    ("losses", "heading"), [([3.8] * 3, "Better"), ([4.2] * 3, "Worse"), ([3.8, 4.2, 4.0], "No")]
)
def test_what_does_not_help_is_said_too(losses, heading):
    text = said(made_study(topk={"loss": [4.0] * 3}, capacity_probs={"loss": losses}))
    words = "difference that the seeds can tell from" if heading == "No" else "than"
    assert f"  · {heading} {words} topk: capacity-probs" in text


def test_a_leaking_choice_is_never_ranked():
    study = made_study(topk={"loss": [4.0] * 3}, expert_choice={"loss": [1.0] * 3})
    text = said(study)
    assert "expert-choice: loss -3.0000 ± 0.0000, which compares with none of the others" in text
    assert "Better" not in text


def test_one_seed_promises_nothing():
    study = Study([made_run(BASELINE, loss=4.0), made_run("none", loss=9.0)], ROUTING)
    text = said(study, replace(SIZES, seeds=1))
    assert "One seed: no difference above can be told from noise" in text
    assert "±" not in text and "Worse" not in text
    assert loss_verdict(Estimate(1.0, None)) == "one seed cannot tell it from noise"
    assert signed(Estimate(1.0, None)) == "+1.0000"


def test_an_option_that_changes_nothing_is_found_out():
    same = made_study(topk={"loss": [4.0] * 3}, freeze={"loss": [4.0] * 3})
    assert "freeze made exactly the runs of topk" in said(same)
    other = made_study(topk={"loss": [4.0] * 3}, freeze={"loss": [4.0, 4.0, 4.1]})
    assert "made exactly" not in said(other)


def test_wider_experts_and_drops_are_in_the_work():
    study = made_study(
        topk={"mean_k": [2.0] * 3},
        switch={"mean_k": [1.0] * 3},
        capacity_probs={"drop": [0.25] * 3},
    )
    found = {name: study.work(name, SIZES) for name in study.names}
    assert found == {"topk": 1.0, "switch": 1.0, "capacity-probs": 0.75}
    less = made_study(topk={"mean_k": [2.0] * 3}, gshard={"mean_k": [1.5] * 3})
    assert "1.500 experts a token, so 0.75 of the arithmetic" in said(less)
    assert "of the arithmetic" not in said(study)


# What is written


def some_study():
    return made_study(
        topk={"loss": [4.0, 4.1, 4.2]},
        expert_choice={"loss": [4.2, 4.1, 4.4]},
        none={"loss": [4.1, 4.1, 4.3], "variance": [1.0] * 3},
        capacity_probs={"drop": [0.1, 0.2, 0.3]},
        noise={"churn": [0.1, 0.2, 0.3]},
    )


def test_tables_hold_every_variant(tmp_path):
    study = some_study()
    console = Console(width=160, record=True, quiet=False, file=(tmp_path / "log").open("w"))
    console.print(tables.console_table(study, SIZES))
    text = console.export_text()
    for name in study.names:
        assert name in text
    assert "+0.0667 ± 0.1434" in text, "none against topk"
    assert "*" in next(line for line in text.splitlines() if "expert-choice" in line)
    tables.write_csv(tmp_path / "table.csv", study, SIZES)
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["variant"] for row in rows] == study.names
    assert float(rows[0]["loss"]) == pytest.approx(4.102)
    tables.write_json(tmp_path / "study.json", study, SIZES, findings(study, SIZES), {"torch": "x"})
    everything = json.loads((tmp_path / "study.json").read_text())
    assert len(everything["runs"]) == 15 and len(everything["runs"][0]["points"]) == 4
    assert everything["findings"][0]["lines"]


def test_picture_has_every_panel_and_line(tmp_path):
    targets = [tmp_path / "a.svg", tmp_path / "b.svg", tmp_path / "c.png"]
    picture.draw(some_study(), SIZES, targets)
    text = targets[0].read_text()
    for panel in ROUTING.panels:
        assert f">{panel.title}<" in text
    for word in ("expert-choice", "capacity-probs", *FAMILIES):
        assert f">{word}<" in text
    assert text == targets[1].read_text(), "the same runs give the same file"
    assert targets[2].read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.svg", "b.svg", "c.png"]


def test_lines_are_means_over_seeds_and_the_first_churn_is_left_out():
    study = made_study(topk={"churn": [0.1, 0.2, 0.3]}, none={"loss": [4.1, 4.2, 4.6]})
    panels = {panel.title: panel for panel in ROUTING.panels}
    steps, mean, low, high = picture.over_time(study, "topk", panels["churn on a fixed probe"])
    assert steps == [20, 30, 40]
    assert (mean[-1], low[-1], high[-1]) == (pytest.approx(0.2), 0.1, 0.3)
    compared = next(panel for panel in ROUTING.panels if panel.compared)
    _, mean, low, high = picture.over_time(study, "none", compared)
    assert (mean[-1], low[-1], high[-1]) == tuple(map(pytest.approx, (0.3, 0.1, 0.6)))


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("before")
    with pytest.raises(RuntimeError), written_whole(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_finished_runs_are_found_again_unless_something_differs(tmp_path):
    run = made_run("kl", seed=2)
    kl = VARIANTS["kl"]
    kept.keep(tmp_path, SIZES, kl, run)
    assert kept.find(tmp_path, replace(SIZES, seeds=9), kl, 2) == run
    assert kept.find(tmp_path, SIZES, kl, 1) is None
    assert kept.find(tmp_path, replace(SIZES, steps=41), kl, 2) is None
    assert kept.find(tmp_path, SIZES, replace(kl, precision="bf16"), 2) is None


# The command


def test_an_unknown_variant_is_refused_by_name():
    result = CliRunner().invoke(study_command(ROUTING), ["--variants", "topk,best"])
    assert result.exit_code == 2
    assert "best: not one of topk, sigmoid, switch" in result.output


def test_without_matplotlib_it_says_so_at_once(monkeypatch):
    module = sys.modules[study_command.__module__]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(study_command(ROUTING), ["--quick"])
    assert result.exit_code == 1
    assert "the picture needs matplotlib: pip install 'megatron-moe[study]'" in result.output


def started(folder, *words):
    return subprocess.Popen(
        [sys.executable, EXAMPLE, "--quick", "--out", folder, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tiny_study_runs_to_its_picture(tmp_path):
    words = ["--variants", "switch,capacity-position", "--steps", "6", "--seeds", "2"]
    child = started(tmp_path, *words)
    output, _ = child.communicate(timeout=580)
    assert child.returncode == 0, output
    for name in ("picture.png", "picture.svg", "table.csv", "study.json"):
        assert (tmp_path / name).stat().st_size > 0
    everything = json.loads((tmp_path / "study.json").read_text())
    assert {run["variant"] for run in everything["runs"]} == {
        "topk", "switch", "none", "capacity-position"
    }  # fmt: skip
    study = Study(
        [
            Run(**run | {"points": tuple(Point(**point) for point in run["points"])})
            for run in everything["runs"]
        ],
        ROUTING,
    )
    assert study.measured("switch", "mean_k").mean == 1.0
    assert study.work("switch", QUICK) == 1.0
    assert study.measured("capacity-position", "drop_rate").mean > 0
    assert study.measured("topk", "drop_rate").mean == 0
    for run in study.of("topk"):
        assert run.points[-1].loss < run.points[0].loss
    assert "less variance than none" in output and "Capacity" in output


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_stopping_it_stops_its_workers_and_keeps_what_is_finished(tmp_path):
    child = started(tmp_path, "--variants", "none", "--steps", "100000", "--workers", "2")
    deadline = time.monotonic() + 240
    for line in child.stdout:
        if line.startswith("2/3"):
            break
        assert time.monotonic() < deadline
    workers = []
    while len(workers) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        # multiprocessing has a process of its own among them, which is no worker.
        workers = [pid for pid in children if EXAMPLE.name in command_of(pid)]
    assert len(workers) == 2
    child.send_signal(signal.SIGTERM)
    rest, _ = child.communicate(timeout=60)
    assert child.returncode == 130, rest
    assert "stopped; finished runs are in" in rest and "Traceback" not in rest
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode()


def alive(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
