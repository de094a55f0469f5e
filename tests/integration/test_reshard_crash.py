"""Runs that are killed, starved or mistaken: nothing half-done is ever seen, and all can go on."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers.reshard_runs import (
    UNFINISHED,
    WISHES,
    DiskFull,
    Running,
    contents,
    is_running,
    nothing_half_done,
    until,
)
from helpers.synthetic import Arch, made, planned

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.read.open import open_checkpoint
from megatron_moe.tools.checkpoint.write import execute as executor
from megatron_moe.tools.checkpoint.write.execute import Options, execute
from megatron_moe.tools.checkpoint.write.journal import NAME as JOURNAL


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 50 MB, so that a run has many batches."""
    arch = Arch(experts=4, hidden=256, ffn=512, vocab=512)
    folder = tmp_path_factory.mktemp("source") / "save"
    return made(folder, arch, form="torch_dist", tp=2, ep=2, etp=1, dp=2, optim="fully")


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, float]:
    """What a run gives that nobody disturbs, and the seconds from its first file to its end."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    started = Running(source, out)
    started.at_work()
    begin = time.monotonic()
    assert started.wait() == 0, started.said()
    return contents(out), time.monotonic() - begin


def disturb(source: Path, out: Path, seconds: float, chance: random.Random) -> int:
    """Kill runs at random points until one ends; return how many were killed."""
    killed = 0
    while True:
        run = Running(source, out, *(["--resume"] if killed else []))
        if killed == 3:
            assert run.wait() == 0, run.said()
            return killed
        run.at_work()
        time.sleep(chance.random() * seconds * 1.1)
        workers = run.workers()
        run.kill()
        code = run.wait()
        nothing_half_done(out)
        if code == 0 and not killed:  # it was too quick: earlier, then
            seconds /= 2
            shutil.rmtree(out)
            continue
        if code == 0:
            return killed
        assert code == -signal.SIGKILL, run.said()
        killed += 1
        gone(workers)


def gone(workers: list[int]) -> None:
    """Workers end with the process that they work for."""
    until(lambda: not any(map(is_running, workers)))


def killed_and_resumed(source: Path, folder: Path, undisturbed: tuple, trials: int) -> int:
    expected, seconds = undisturbed
    chance, killed = random.Random(trials), 0
    for trial in range(trials):
        out = folder / f"out{trial}"
        killed += disturb(source, out, seconds, chance)
        assert contents(out) == expected
        shutil.rmtree(out)
    return killed


def test_killed_and_resumed(source: Path, tmp_path: Path, undisturbed: tuple) -> None:
    assert killed_and_resumed(source, tmp_path, undisturbed, 3) >= 3


@pytest.mark.slow
def test_killed_and_resumed_many_times(source: Path, tmp_path: Path, undisturbed: tuple) -> None:
    assert killed_and_resumed(source, tmp_path, undisturbed, 30) >= 30


def test_a_killed_worker(source: Path, tmp_path: Path, undisturbed: tuple) -> None:
    run = Running(source, tmp_path / "out")
    run.at_work()
    until(lambda: len(run.workers()) == 2)
    os.kill(run.workers()[0], signal.SIGKILL)
    assert run.wait() == 1
    assert run.said().splitlines()[-1] == (
        f"megatron-moe reshard: {tmp_path}/out/{UNFINISHED}: a worker process was killed (out of "
        "memory?). Nothing was published; run again with --resume, perhaps with fewer --workers or "
        "a smaller --max-ram"
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == [UNFINISHED]
    assert Running(source, tmp_path / "out", "--resume").wait() == 0
    assert contents(tmp_path / "out") == undisturbed[0]


def test_two_runs_at_one_place(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = Running(source, out)
    until(lambda: (out / UNFINISHED / JOURNAL).exists() and run.workers())
    os.kill(run.pid, signal.SIGSTOP)
    try:
        for options in (Options(), Options(resume=True), Options(force=True)):
            with pytest.raises(CheckpointError, match="another process is writing it; wait for it"):
                execute(planned(open_checkpoint(source), **WISHES), out, options)
    finally:
        os.kill(run.pid, signal.SIGCONT)
    assert run.wait() == 0, run.said()
    nothing_half_done(out)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("writes", [0, 40])
def test_full_disk(
    source: Path, tmp_path: Path, undisturbed: tuple, monkeypatch: pytest.MonkeyPatch,
    workers: int, writes: int,
) -> None:  # fmt: skip
    plan = planned(open_checkpoint(source), **WISHES)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(executor, "_BATCH", 1 << 20)
        patch.setattr("os.pwrite", DiskFull(writes))
        with pytest.raises(CheckpointError) as caught:
            execute(plan, out, Options(workers=workers))
    assert str(caught.value) == (
        f"{out}/{UNFINISHED}: the disk is full. Nothing was published; make room and run again "
        "with --resume"
    )
    assert [p.name for p in out.iterdir()] == [UNFINISHED]
    monkeypatch.setattr(executor, "_BATCH", 1 << 20)
    execute(plan, out, Options(resume=True, workers=workers))
    assert contents(out) == undisturbed[0]
