"""Mistakes are refused before a byte is written; what was interrupted is taken up where it was."""

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.reshard_runs import (
    FINAL,
    TRACKER,
    UNFINISHED,
    WISHES,
    DiskFull,
    contents,
    nothing_half_done,
)
from helpers.synthetic import made, planned

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.read.open import open_checkpoint
from megatron_moe.tools.checkpoint.write import execute as executor
from megatron_moe.tools.checkpoint.write.execute import Options, execute
from megatron_moe.tools.checkpoint.write.journal import NAME as JOURNAL
from megatron_moe.tools.checkpoint.write.publish import publish


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "save"
    return made(folder, form="torch_dist", tp=2, ep=2, etp=1, dp=2, optim="fully")


def test_no_room_is_seen_before_a_byte_is_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(open_checkpoint(small), **WISHES)
    usage = shutil._ntuple_diskusage(1 << 40, 1 << 40, 100)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    need = int(plan.write_bytes * 1.01)
    with pytest.raises(CheckpointError) as caught:
        execute(plan, tmp_path / "out", Options())
    assert str(caught.value) == (
        f"{tmp_path}: {need:,} bytes are needed, 100 are free; make room, or choose another OUT"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A superuser may write where the mode says no, so the answer is given here.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(CheckpointError) as caught:
        execute(planned(open_checkpoint(small), **WISHES), tmp_path / "a" / "out", Options())
    assert str(caught.value) == f"{tmp_path}: cannot be written to; choose another OUT"
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_a_file(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="out: cannot be written to; choose another OUT"):
        execute(planned(open_checkpoint(small), **WISHES), tmp_path / "out", Options())
    assert (tmp_path / "out").read_text() == "mine"


def test_what_exists_is_replaced_only_by_force(small: Path, tmp_path: Path) -> None:
    plan = planned(open_checkpoint(small), **WISHES)
    execute(plan, tmp_path / "fresh", Options(workers=1))
    out = tmp_path / "out"
    (out / FINAL).mkdir(parents=True)
    (out / FINAL / "mine").write_text("mine")
    (out / TRACKER).write_text("5")
    with pytest.raises(CheckpointError) as caught:
        execute(plan, out, Options())
    assert str(caught.value) == f"{out}/{FINAL}: exists already; pass --force to replace it"
    assert (out / FINAL / "mine").read_text() == "mine"
    execute(plan, out, Options(force=True, workers=1))
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("place", [".", FINAL])
def test_the_source_is_no_target(small: Path, place: str) -> None:
    before = {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    for force in (False, True):
        with pytest.raises(CheckpointError, match="is the source itself; give another folder"):
            execute(planned(open_checkpoint(small), **WISHES), small / place, Options(force=force))
    assert {p: p.stat().st_mtime_ns for p in small.rglob("*")} == before


def test_a_run_killed_before_the_tracker(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is there, whole; what is left to do is to say so."""
    plan, out = planned(open_checkpoint(small), **WISHES), tmp_path / "out"

    def killed(path: Path, content: bytes) -> None:
        raise OSError(errno.EIO, "killed")

    with monkeypatch.context() as patch:
        patch.setattr(f"{publish.__module__}.write_forced", killed)
        with pytest.raises(CheckpointError, match="killed"):
            execute(plan, out, Options(workers=1))
    assert [p.name for p in out.iterdir()] == [FINAL]
    with pytest.raises(CheckpointError, match="exists already"):
        execute(planned(open_checkpoint(small), **(WISHES | {"tp": 2})), out, Options(resume=True))
    execute(plan, out, Options(resume=True))
    assert contents(out) == fresh(small, tmp_path / "other")


@dataclass
class Halted:
    """A run that ended early, with what is needed to go on."""

    source: Path
    out: Path

    @property
    def journal(self) -> Path:
        return self.out / UNFINISHED / JOURNAL

    def go_on(self, **wishes: object) -> None:
        plan = planned(open_checkpoint(self.source), **(WISHES | wishes))
        execute(plan, self.out, Options(resume=True, workers=1))


@pytest.fixture
def halted(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Halted]:
    """Half of the writes done, each batch noted."""
    source = Path(shutil.copytree(small, tmp_path / "source"))
    plan = planned(open_checkpoint(source), **WISHES)
    monkeypatch.setattr(executor, "_BATCH", 1 << 10)
    monkeypatch.setattr(executor, "_FLUSH_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", DiskFull(100))
        with pytest.raises(CheckpointError, match="the disk is full"):
            execute(plan, tmp_path / "out", Options(workers=1))
    yield Halted(source, tmp_path / "out")


def fresh(source: Path, out: Path, **wishes: object) -> dict[str, str]:
    execute(planned(open_checkpoint(source), **(WISHES | wishes)), out, Options(workers=1))
    return contents(out)


def test_resume_takes_up_what_is_noted(halted: Halted, tmp_path: Path) -> None:
    noted = halted.journal.read_text().splitlines()
    assert len(noted) > 1
    halted.go_on()
    assert contents(halted.out) == fresh(halted.source, tmp_path / "other")


def test_an_interrupted_run_is_not_overwritten_unasked(halted: Halted, tmp_path: Path) -> None:
    plan = planned(open_checkpoint(halted.source), **WISHES)
    with pytest.raises(CheckpointError) as caught:
        execute(plan, halted.out, Options())
    assert str(caught.value) == (
        f"{halted.out}/{UNFINISHED}: an earlier run was interrupted; pass --resume to go on with "
        "it, or --force to start over"
    )
    execute(plan, halted.out, Options(force=True, workers=1))
    assert contents(halted.out) == fresh(halted.source, tmp_path / "other")


def test_resume_with_another_plan_is_refused(halted: Halted) -> None:
    with pytest.raises(CheckpointError) as caught:
        halted.go_on(tp=2)
    assert str(caught.value) == (
        f"{halted.journal}: belongs to another plan (source or options have changed since); pass "
        "--force to start over"
    )


def test_resume_after_the_source_changed_is_refused(halted: Halted) -> None:
    file = next((halted.source / FINAL).glob("*.distcp"))
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"source or options have changed since"):
        halted.go_on()


@pytest.mark.parametrize("torn", [1, 20])
def test_a_torn_last_line_of_the_journal(halted: Halted, tmp_path: Path, torn: int) -> None:
    with halted.journal.open("r+b") as journal:
        journal.truncate(halted.journal.stat().st_size - torn)
    halted.go_on()
    assert contents(halted.out) == fresh(halted.source, tmp_path / "other")


@pytest.mark.parametrize("journal", [None, b"", b'{"plan": "4'])
def test_without_a_journal_resume_starts_over(
    halted: Halted, tmp_path: Path, journal: bytes | None
) -> None:
    """What is left may be hard links to files of the source: they are not written through."""
    before = {p: p.read_bytes() for p in (halted.source / FINAL).iterdir()}
    for left in (halted.out / UNFINISHED).rglob("*.pt"):
        left.unlink()
        left.hardlink_to(next((halted.source / FINAL).glob("*.distcp")))
    halted.journal.unlink()
    if journal is not None:
        halted.journal.write_bytes(journal)
    halted.go_on()
    assert contents(halted.out) == fresh(halted.source, tmp_path / "other")
    assert {p: p.read_bytes() for p in (halted.source / FINAL).iterdir()} == before


def test_a_source_that_changes_its_bytes_is_refused(small: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(small, tmp_path / "source"))
    plan = planned(open_checkpoint(source), **WISHES)
    job = max(plan.jobs, key=lambda job: job.nbytes)
    record = plan.source.tensors.records[job.sources[0].record]
    start, length = record.archive
    with (source / FINAL / record.path).open("r+b") as file:
        # The largest stretch of an archive are its numbers.
        at = start + length // 2
        byte = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 0x10]), at)
    with pytest.raises(CheckpointError) as caught:
        execute(plan, tmp_path / "out", Options(workers=1))
    assert str(caught.value) == (
        f"{source}/{FINAL}/{record.path}: {record.label}: its bytes do not match their CRC: they "
        "have changed since it was written. Restore the file from a copy, or take another iteration"
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == [UNFINISHED]
    execute(plan, tmp_path / "out", Options(workers=1, force=True, verify_source=False))
    nothing_half_done(tmp_path / "out")
