"""The router benchmark: a naive loop that is right, goals that can be missed, what it refuses."""

import json

import pytest
import torch
from click.testing import CliRunner
from helpers.layout import Layout
from rich.console import Console

from megatron_moe.tools.bench import child, route, route_process, route_table
from megatron_moe.tools.bench.route_case import KINDS, RouteCase, RouteJob
from megatron_moe.tools.bench.route_naive import naive_route


def test_naive_loop_of_a_case_worked_out_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])).requires_grad_()
    found = naive_route(logits, 2, aux_coeff=1.0)
    assert [tokens.tolist() for tokens in found.tokens] == [[0], [0, 1], [1]]
    weights = [w for weights in found.weights for w in weights.tolist()]
    assert weights == pytest.approx([5 / 8, 3 / 8, 2 / 9, 7 / 9])
    assert found.counts_E.tolist() == [1, 2, 1]
    # 3 · (1/4 · 0.3 + 2/4 · 0.25 + 1/4 · 0.45)
    assert found.loss.item() == pytest.approx(0.9375)
    assert naive_route(logits, 2, z_coeff=1.0).loss.item() == pytest.approx(0.0, abs=1e-6)
    assert naive_route(logits + 2.0, 2, z_coeff=0.5).loss.item() == pytest.approx(2.0)


def test_naive_loop_chooses_by_bias_and_weighs_without():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    found = naive_route(
        logits, 1, score_function="sigmoid", bias_E=torch.tensor([0.0, 0.0, 0.0, 1.0])
    )
    assert found.counts_E.tolist() == [0, 0, 0, 1]
    assert found.weights[3].tolist() == [1.0]


def test_naive_loop_keeps_to_the_best_groups():
    logits = torch.tensor([[3.0, -9.0, 2.0, 2.0, 1.0, 0.0]])
    found = naive_route(logits, 2, score_function="sigmoid", num_groups=3, group_topk=1)
    # Together the second group's two are better than the first group's best.
    assert found.counts_E.tolist() == [0, 0, 1, 1, 0, 0]


def _all_differences(world, kinds):
    from helpers.megatron_world import enter_layout

    from megatron_moe.tools.bench.route_process import differences
    from megatron_moe.tools.bench.route_sides import Routers

    enter_layout(Layout())
    return {
        (kind, gated): differences(Routers(RouteCase(kind, 300, 16, 4, hidden=24), gated=gated))
        for kind in kinds
        for gated in (True, False)
    }


def test_all_sides_compute_the_same(pool):
    (found,) = pool.run(_all_differences, list(KINDS), world_size=1)
    assert len(found) == 6
    for case, differences in found.items():
        assert differences.keys() == {"naive", "ours", "ours, by expert"}, case
        assert max(differences.values()) < 1e-5, (case, differences)


def _differences_without_our_losses(world):
    from helpers.megatron_world import enter_layout

    from megatron_moe.tools.bench.route_process import differences
    from megatron_moe.tools.bench.route_sides import Routers

    enter_layout(Layout())
    routers = Routers(RouteCase("topk", 200, 8, 2, hidden=16), gated=False)
    routers.routers["ours"].losses.attach = lambda probs_TK, *args: probs_TK
    return differences(routers)


def test_a_loss_left_out_is_noticed(pool):
    (found,) = pool.run(_differences_without_our_losses, world_size=1)
    assert found["naive"] < 1e-5
    assert found["ours"] == 1.0  # the gradient of the losses alone is missing altogether


def _result(naive, upstream, ours, ordered, gate):
    seconds = {"naive": naive, "upstream": upstream, "ours": ours, "ours, by expert": ordered}
    return {
        "kind": "topk",
        "name": "64 experts",
        "gate": gate,
        "seconds": {
            "whole": {side: time + gate for side, time in seconds.items()},
            "without gate": seconds,
        },
        "differences": {"naive": 2e-7, "ours": 1e-7, "ours, by expert": 1e-7},
    }


def _rows(runs):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(route_table.route_table(runs, "topk"))
    lines = capture.get().splitlines()
    return [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")
    ]


def test_table_says_which_goals_are_met():
    whole, choice = _rows([[_result(0.090, 0.020, 0.008, 0.010, 0.030)]])
    assert whole == [
        "64 experts", "whole", "30.0", "120.0", "50.0", "38.0 / 40.0",
        "3.00", "missed, at most 4.0", "1.32", "met", "2e-07",
    ]  # fmt: skip
    assert choice == [
        "", "without gate", "", "90.0", "20.0", "8.0 / 10.0", "9.00", "met", "2.50", "met", "",
    ]  # fmt: skip


def test_table_shows_medians_and_a_goal_that_is_missed():
    runs = [[_result(0.070, upstream, 0.010, 0.010, 0.001)] for upstream in (0.007, 0.009, 0.008)]
    whole, choice = _rows(runs)
    assert whole[7] == "missed"  # a router of the gate alone would reach 71
    assert choice[6:10] == ["7.00 (7.00–7.00)", "missed", "0.80 (0.70–0.90)", "missed"]


@pytest.mark.parametrize(
    ("ratio", "most", "said"),
    [(8.1, None, "met"), (7.7, None, "in the noise"), (7.0, 40.0, "missed"), (2, 3.06, "most 3.1")],
)
def test_verdict_on_the_naive_goal(ratio, most, said):
    assert said in route_table.naive_verdict(ratio, most)
    assert ("at most" in route_table.naive_verdict(ratio, most)) == (most == 3.06)


def test_many_tokens_are_repeated_half_as_often():
    cases = [RouteCase("topk", tokens, 8, 2) for tokens in (4096, 32768)]
    job = RouteJob.from_json(json.loads(json.dumps(RouteJob(cases, 7).as_json())))
    assert job == RouteJob(cases, 7)
    assert [job.rounds_of(case) for case in job.cases] == [7, 4]


def test_process_refuses_an_allocator_that_is_not_pinned(tmp_path, monkeypatch):
    for name, value in child.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    with pytest.raises(RuntimeError) as error:
        route_process.main(tmp_path)
    assert str(error.value) == (
        "MALLOC_TRIM_THRESHOLD_ must be set before Python starts: use route.py"
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [("8,x", "8,x: not whole numbers with commas between"), ("0", "0: must be positive")],
)
def test_numbers_that_are_none(value, said):
    result = CliRunner().invoke(route.main, ["--experts", value])
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.slow
def test_one_small_case_from_end_to_end(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--quick", "--tokens", "256", "--experts", "8", "--hidden", "32", "--rounds", "1"]
    result = CliRunner().invoke(route.main, [*arguments, "--kind", "bias", "--json", str(out)])
    assert result.exit_code == 0, result.output
    ((case,),) = json.loads(out.read_text())["processes"]
    assert case["name"] == "8 experts, top-2, 256 tokens"
    for part in ("whole", "without gate"):
        assert case["seconds"][part].keys() == {"naive", "upstream", "ours", "ours, by expert"}
        assert min(case["seconds"][part].values()) > 0
    assert 0 < case["gate"] < case["seconds"]["whole"]["naive"]
    assert max(case["differences"].values()) < 1e-5
