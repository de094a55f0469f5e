"""The demo's parts, and the whole of it in its quick form."""

import io
import json
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from megatron_moe.tools.demo import command, picture, plan
from megatron_moe.tools.demo.child import ChildError, run
from megatron_moe.tools.demo.command import verdict
from megatron_moe.tools.demo.display import shown_run
from megatron_moe.tools.demo.megatron_log import History, Load, Step, Validation, parse

STEP = (
    " [2026-01-02 03:04:05.678901] iteration       12/     320 | consumed samples:          192 | "
    "elapsed time per iteration (ms): 250.0 | learning rate: 1.125000E-03 | "
    "global batch size:    16 | lm loss: 5.431210E+00 | load_balancing_loss: 1.05E+00 | "
    "loss scale: 1.0 | grad norm: 1.234 | number of skipped iterations:   0 |"
)
VALIDATION = (
    " validation loss at iteration 320 on validation set | lm loss value: 4.712300E+00 | "
    "lm loss PPL: 1.113066E+02 | "
)


def test_lines_of_megatron_are_read():
    assert parse(STEP) == Step(12, 320, 5.43121, 0.25)
    assert parse(VALIDATION) == Validation(320, 4.7123)
    assert parse(VALIDATION.replace(" on validation set", "")) == Validation(320, 4.7123)
    assert parse(" expert load | layer 3 | 10 0 7") == Load(3, (10, 0, 7))
    assert parse("[default0]:" + STEP) == parse(STEP)
    assert parse("-" * 100) is None
    assert (
        parse(" > number of parameters on (tensor, pipeline) model parallel rank (0, 0): 9") is None
    )


def test_history_keeps_the_first_and_the_last_load():
    history = History()
    for record in (Load(1, (5, 1)), Load(1, (4, 2)), Load(1, (3, 3))):
        history.add(record)
    assert (history.first_load, history.last_load) == ({1: (5, 1)}, {1: (3, 3)})


def test_second_line_of_a_run_is_undone_from_its_mean():
    history = History()
    for step in (Step(9, 12, 9.0, 4.0), Step(10, 12, 8.5, 5.0), Step(11, 12, 7.0, 2.0)):
        history.add(step)
    assert history.losses == {9: 9.0, 10: 8.0, 11: 7.0}
    assert history.seconds == {9: 4.0, 10: 1.0, 11: 2.0}
    assert history.seconds_per_step() == 2.0


def test_rate_of_a_run_without_steps_is_refused():
    with pytest.raises(ValueError, match="the run's log shows no training step"):
        History().seconds_per_step()


@pytest.mark.parametrize("sizes", [plan.FULL, plan.QUICK])
def test_twin_has_the_active_parameters_of_the_mixture(sizes):
    routers = sizes.layers * sizes.hidden * sizes.experts
    assert sizes.active_parameters - sizes.dense_parameters == routers
    assert routers < 0.02 * sizes.dense_parameters
    idle = (sizes.experts - sizes.topk) * 2 * sizes.hidden * sizes.expert_ffn * sizes.layers
    assert sizes.moe_parameters - sizes.active_parameters == idle
    assert sizes.iterations % sizes.eval_interval == 0
    assert sizes.vocab_size % (2 * 128) == 0, "padding must not depend on TP"


def test_options_are_spelled_as_megatron_spells_them():
    words = plan.first_layout(plan.FULL, "here")
    assert words == [
        "--expert-model-parallel-size",
        "2",
        "--save",
        "here",
        "--save-interval",
        "400",
    ]
    assert "--sequence-parallel" in plan.second_layout(plan.FULL, "here")
    for before, word in pairwise(plan.second_layout(plan.FULL, "here")):
        assert word != "True", f"{before} is a flag without a value"


def test_bars_are_scaled_to_twice_an_even_share():
    high, middle, low = picture.bar_rows([0, 4, 8, 4], rows=3)
    assert low == "   ██ ██ ██"
    assert middle == "   ▄▄ ██ ▄▄"
    assert high == "      ██   "
    assert picture.bar_rows([0, 0]) == ["     "] * 3, "nothing counted draws nothing"
    assert picture.bar_rows([90, 5, 5, 0, 0, 0, 0, 0])[0].startswith("██"), "cut off, not overflown"


def drawn(table):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_losses_stand_beside_each_other():
    dense = History({1: 5.0}, {1: 0.5}, {50: 4.25, 100: 4.0})
    moe = History({1: 5.0}, {1: 1.0}, {50: 4.5, 100: 3.5, 150: 3.0})
    text = drawn(picture.losses(plan.FULL, dense, moe))
    assert "+0.2500" in text and "-0.5000" in text
    assert "150" not in text, "only iterations that both have can be compared"
    assert f"{plan.FULL.tokens_per_step * 2:,}" in text


def test_load_is_drawn_early_and_late():
    history = History()
    for record in (Load(1, (8, 0)), Load(2, (4, 4)), Load(1, (3, 1)), Load(2, (0, 0))):
        history.add(record)
    history.last_load[2] = (5, 5)
    lines = drawn(picture.load(plan.FULL, history)).splitlines()
    first = next(line for line in lines if "1.50 ×" in line)
    assert "0.50 ×" in first and first.startswith("│     1 │")
    assert any("1.00 ×" in line for line in lines)


def test_resumed_losses_show_their_difference():
    went_on = History({9: 2.0, 10: 1.5}, {}, {10: 1.75})
    again = History({9: 2.0, 10: 1.625}, {}, {10: 1.75})
    text = drawn(picture.resumed(went_on, again))
    assert "+1.2e-01" in text and "+0.0e+00" in text and "validation, 10" in text


def test_verdict_says_whatever_came_out():
    better, worse = History({}, {}, {8: 9.0, 10: 3.5}), History({}, {}, {8: 1.0, 10: 3.75})
    assert verdict(worse, better).startswith("After 10 steps its validation loss was 0.250 below")
    assert verdict(better, worse).startswith("After 10 steps its validation loss was 0.250 above")


def test_output_is_kept_and_handed_on(tmp_path):
    lines = []
    run([sys.executable, "-c", "print('a'); print('b')"], tmp_path / "x" / "log", lines.append)
    assert lines == ["a\n", "b\n"]
    assert (tmp_path / "x" / "log").read_text() == "a\nb\n"


def test_failure_shows_the_worker_s_error_and_names_the_log(tmp_path):
    program = (
        "import sys\n"
        "print('Traceback (most recent call last):\\n  File x\\nValueError: num_experts (7) …')\n"
        "print('Traceback\\n' * 50 + 'torch.x.ChildFailedError: \\n=====')\n"
        "sys.exit(3)"
    )
    with pytest.raises(ChildError) as caught:
        run([sys.executable, "-c", program], tmp_path / "log", lambda line: None)
    message = str(caught.value)
    assert "ValueError: num_experts (7) …" in message
    assert "ChildFailedError" not in message
    assert f"ended with status 3; the lines above are from {tmp_path / 'log'}" in message


def test_stopping_the_demo_stops_what_it_started(tmp_path):
    program = (
        "import subprocess, sys; from pathlib import Path\n"
        "from megatron_moe.tools.demo.child import run\n"
        "words = ['sh', '-c', 'echo $$; sleep 60 & echo $!; wait']\n"
        "run(words, Path(sys.argv[1]), lambda line: None)"
    )
    log = tmp_path / "log"
    parent = subprocess.Popen([sys.executable, "-c", program, str(log)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and (not log.exists() or log.read_text().count("\n") < 2):
        time.sleep(0.05)
    family = [int(line) for line in log.read_text().split()]
    assert len(family) == 2
    parent.send_signal(signal.SIGTERM)
    _, error = parent.communicate(timeout=30)
    assert b"KeyboardInterrupt" in error
    while time.monotonic() < deadline and any(map(alive, family)):
        time.sleep(0.05)
    assert not any(map(alive, family))


def alive(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines():
    for terminal in (True, False):
        console = Console(force_terminal=terminal, record=True, file=io.StringIO())
        with shown_run(console, "moe", 0, 320, 2048) as display:
            display.line(STEP)
            display.line(VALIDATION)
        assert display.history.losses == {12: 5.43121}
        text = console.export_text()
        assert "iteration 320, validation loss 4.7123" in text
        assert ("12/320" in text) is terminal


def test_outside_a_clone_it_says_where_to_run(monkeypatch, tmp_path):
    from megatron_moe.tools.demo import command as module

    story = sys.modules[module.callback.__module__]
    monkeypatch.setattr(story, "EXAMPLE", Path("no") / "such.py")
    result = CliRunner().invoke(command, ["--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "the demo runs from a clone of the repository, by `make demo`" in result.output


@pytest.mark.timeout(900)  # 80 s on two idle cores
def test_quick_demo_trains_resumes_and_agrees(tmp_path):
    program = Path(sys.executable).with_name("megatron-moe")
    done = subprocess.run(
        [program, "demo", "--quick", "--out", tmp_path], capture_output=True, text=True, timeout=880
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    moe, resumed = summary["moe"], summary["resumed"]
    assert list(map(int, resumed["losses"])) == [9, 10]
    for iteration, loss in resumed["losses"].items():
        assert abs(loss - moe["losses"][iteration]) < 1e-3
    assert moe["losses"]["10"] < moe["losses"]["1"]
    tokens = plan.QUICK.tokens_per_step * plan.QUICK.topk
    for counts in moe["expert_load"].values():
        assert len(counts) == plan.QUICK.experts
        assert sum(counts) % tokens == 0 and sum(counts) > 0
    for words in ("What you saw", "What to try next", "Tokens by expert", "tokens/s"):
        assert words in done.stdout
