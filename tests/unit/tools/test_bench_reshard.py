"""The resharding benchmark: what it makes is a checkpoint, what it measures is what happened."""

import sys
from math import prod
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from megatron_moe.tools.bench import reshard
from megatron_moe.tools.bench.reshard_table import Row, cost_table
from megatron_moe.tools.bench.synthetic import Model, make
from megatron_moe.tools.bench.watch import Cost, cool, size_of, watch
from megatron_moe.tools.checkpoint.read.open import open_checkpoint
from megatron_moe.tools.checkpoint.verify import compare, verify

TINY = Model(hidden=32, ffn=16, layers=2, experts=4)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for name, (form, layout, optimizer) in reshard.SOURCES.items():
        make(folder / name, TINY, layout, form, optimizer)
    return folder


@pytest.mark.parametrize("nbytes", [4e7, 4e8, 4e9, 64e9])
def test_model_has_the_wanted_size_mostly_in_experts(nbytes):
    shapes = Model.of_bytes(nbytes).shapes()
    numel = {name: prod(shape) for name, shape in shapes.items()}
    experts = sum(n for name, n in numel.items() if ".experts." in name)
    assert 14 * sum(numel.values()) == pytest.approx(nbytes, rel=0.1)
    assert experts > 0.6 * sum(numel.values())


def test_every_form_is_whole_and_holds_the_same(sources):
    opened = {name: open_checkpoint(sources / name) for name in reshard.SOURCES}
    kinds = [one.optimizer.kind for one in opened.values()]
    assert kinds == ["fully_reshardable", "distributed", "dp_reshardable"]
    verdicts = {name: verify(one, workers=1) for name, one in opened.items()}
    first = verdicts["torch_dist"]
    for name, verdict in verdicts.items():
        assert not verdict.faults
        assert verdict.checked["masters"] == len(TINY.shapes())
        assert not compare(opened["torch_dist"], opened[name], first.digests, verdict.digests)
    # Nothing but what a training run leaves.
    assert {p.name for p in (sources / "torch_dist").rglob("*")} == {
        "latest_checkpointed_iteration.txt", "iter_0000007", ".metadata", "metadata.json",
        "__0_0.distcp", "__1_0.distcp",
    }  # fmt: skip


def test_the_same_sizes_give_the_same_bytes(sources, tmp_path):
    form, layout, optimizer = reshard.SOURCES["torch"]
    make(tmp_path / "again", TINY, layout, form, optimizer)
    again = {p.relative_to(tmp_path / "again"): p for p in (tmp_path / "again").rglob("*.pt")}
    assert len(again) == 8
    for name, path in again.items():
        assert path.read_bytes() == (sources / "torch" / name).read_bytes()


_SLOW = pytest.mark.slow
_CASES = [pytest.param(c, id=c.name, marks=() if c.load_save else _SLOW) for c in reshard.CASES]


@pytest.mark.parametrize("case", _CASES)
def test_cases_do_what_they_are_named_for(sources, tmp_path, case):
    source = sources / case.source
    out = tmp_path / "out"
    watch(
        [*reshard._COMMAND, "reshard", str(source), str(out), *case.options, "--progress", "none"]
    )
    one, other = open_checkpoint(source), open_checkpoint(out)
    assert not compare(one, other, {}, {})
    before = {path.stat().st_ino for path in source.rglob("*.distcp")}
    shared = before & {path.stat().st_ino for path in out.rglob("*.distcp")}
    assert shared == (set() if case.rewrites else before)


def test_cost_of_a_command_with_children(tmp_path):
    data = tmp_path / "data"
    data.write_bytes(bytes(3_000_000))
    script = (
        "import os, subprocess, sys, time\n"
        "if len(sys.argv) > 1:\n"
        "    held = b'1' * 40_000_000\n"
        f"    open({str(data)!r}, 'rb').read()\n"
        "    time.sleep(0.4)\n"
        "else:\n"
        "    subprocess.run([sys.executable, '-c', sys.orig_argv[2], 'child'], check=True)\n"
        "    print('done')\n"
    )
    cost = watch([sys.executable, "-c", script])
    assert cost.output == "done\n"
    assert 0.4 < cost.seconds < 10
    assert 40e6 < cost.private < 80e6
    assert 3e6 < cost.read < 9e6
    assert 0 < cost.cpu < cost.seconds + 1


def test_a_command_that_fails_is_shown_with_its_last_lines():
    with pytest.raises(RuntimeError, match=r"failed \(3\):\nno such thing$"):
        watch([sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"])


def test_sizes_of_folders(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(bytes(5))
    (tmp_path / "b").write_bytes(bytes(7))
    cool(tmp_path)
    assert size_of(tmp_path) == 12


def _cost(seconds, private=1e8, read=4e9):
    return Cost(seconds, 1.0, int(private), int(read), 0, "")


def _row(ours, cp, load_save, **figures):
    return Row("a case", int(4e9), True, {
        "cp": [_cost(s) for s in cp],
        "ours": [_cost(s, **figures) for s in ours],
        "load+save": [_cost(s) for s in load_save],
    })  # fmt: skip


def test_ratios_are_taken_round_by_round():
    # A slow second round, on both sides alike.
    row = _row([12.0, 120.0, 11.0], [10.0, 100.0, 10.0], [60.0, 480.0, 44.0])
    assert row.ratio("ours", "cp") == pytest.approx((1.2, 1.1, 1.2))
    assert row.ratio("load+save", "ours") == pytest.approx((4.0, 4.0, 5.0))
    assert all(row.goals().values())


@pytest.mark.parametrize(
    ("change", "goal"),
    [
        ({"ours": [13.5] * 3}, "≤ 1.3× cp"),
        ({"load_save": [39.0] * 3}, "≥ 4× load+save"),
        ({"private": 1.01e9}, "≤ 1 GB private"),
        ({"read": 4.3e9}, "read ≤ 1.05×"),
    ],
)
def test_a_goal_that_is_not_met_is_said(change, goal):
    figures = {"ours": [10.0] * 3, "cp": [10.0] * 3, "load_save": [60.0] * 3}
    row = _row(**(figures | change))
    assert [name for name, met in row.goals().items() if not met] == [goal]
    shown = _printed([row])
    assert shown.count("not met") == 1
    assert f"{goal} not met" in shown


def test_seconds_are_goals_of_what_moves_no_bytes():
    metadata = Row("EP2 → EP4", int(4e9), False, {"ours": [_cost(4.9), _cost(9.0), _cost(1.0)]})
    helped = Row("inspect --help", 0, False, {"ours": [_cost(1.1)]})
    assert metadata.goals() == {"≤ 1 GB private": True, "< 5 s": True}
    assert helped.goals() == {"< 1 s": False}
    assert Row("inspect", 0, False, {"ours": [_cost(30.0)]}).goals() == {}


def _printed(rows):
    console = Console(width=240)
    with console.capture() as capture:
        console.print(cost_table(rows, "a model"))
    return capture.get()


def test_table_shows_medians_with_their_spread():
    row = _row([12.0, 120.0, 11.0], [10.0, 100.0, 10.0], [60.0, 480.0, 44.0])
    line = next(line for line in _printed([row]).splitlines() if "a case" in line)
    for cell in ("4.00", "12.00", "10.00", "1.20 (1.10–1.20)", "60.0", "4.00 (4.00–5.00)", "100"):
        assert cell in line


def test_unknown_cases_are_named_with_the_known_ones():
    result = CliRunner().invoke(reshard.main, ["--cases", "1,9"])
    assert result.exit_code == 2
    assert "9: not one of 1, 2, 3, 4, 5" in result.output


@pytest.mark.slow
def test_quick_run_from_end_to_end(tmp_path):
    arguments = ["--quick", "--gigabytes", "0.01", "--cases", "1,5", "--folder", str(tmp_path)]
    result = CliRunner(env={"COLUMNS": "240"}).invoke(reshard.main, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.count("≤ 1 GB private met") == 2
    assert not list(Path(tmp_path).iterdir())
