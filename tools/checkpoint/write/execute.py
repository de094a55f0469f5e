"""Carry a plan out: prepare the files, let workers fill them, close and publish them."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.plan.compile import Plan
from megatron_moe.tools.checkpoint.read.locate import folder_name
from megatron_moe.tools.checkpoint.stored import crc
from megatron_moe.tools.checkpoint.stored.records import Files, crc_of, gaps_in
from megatron_moe.tools.checkpoint.write import manifest
from megatron_moe.tools.checkpoint.write.journal import Journal
from megatron_moe.tools.checkpoint.write.lifeline import Lifeline
from megatron_moe.tools.checkpoint.write.progress import Progress, shown
from megatron_moe.tools.checkpoint.write.publish import (
    check_place,
    point_at,
    publish,
    unfinished,
)
from megatron_moe.tools.checkpoint.write.worker import Batch, Done, Worker

_BATCH = 32 << 20  # bytes given to a worker at once
_FLUSH_S = 5.0  # between points from which an interrupted run can go on


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run.

    Args:
        workers: Processes.
        max_ram: Bytes that all processes together may use for buffers.
        force: Replace what is there.
        resume: Go on with an interrupted run.
        verify_source: Check the CRC of every source record that is read.
        progress: ``bar``, ``json`` or ``none``.
    """

    workers: int = 2
    max_ram: int = 1 << 30
    force: bool = False
    resume: bool = False
    verify_source: bool = True
    progress: str = "none"


def execute(plan: Plan, out: Path, options: Options) -> Path:
    """Write the target.

    Returns:
        Folder of the new checkpoint.

    Raises:
        CheckpointError: Nothing was published; what is done can be taken up with ``--resume``.
    """
    out = out.absolute()
    folder, identity = unfinished(out, plan), plan.identity()
    iteration = plan.source.location.iteration
    final = out / folder_name(iteration)
    if options.resume and manifest.read(final).get("plan") == identity:
        point_at(out, iteration)  # all that a run had left to do that ended right before
        return final
    check_place(out, plan, force=options.force)
    try:
        interrupted = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(folder)
        try:
            if interrupted and not (options.resume or options.force):
                raise CheckpointError(
                    f"{folder}: an earlier run was interrupted; pass --resume to go on with it, or "
                    "--force to start over"
                )
            journal.begin(identity, resume=options.resume)
            if not journal.done:
                _clear(folder, journal)
            return _fill(plan, out, folder, journal, identity, options)
        finally:
            journal.close()
    except OSError as fault:
        raise CheckpointError(_explained(fault, folder)) from fault


def _clear(folder: Path, journal: Journal) -> None:
    """Remove what an earlier run left. Some of it may be the source's own files, hard-linked."""
    for path in folder.iterdir():
        if path == journal.path:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _explained(fault: OSError, folder: Path) -> str:
    if fault.errno == errno.ENOSPC:
        return (
            f"{folder}: the disk is full. Nothing was published; make room and run again with "
            "--resume"
        )
    return f"{folder}: {fault}. Nothing was published; run again with --resume"


def _fill(
    plan: Plan, out: Path, folder: Path, journal: Journal, identity: str, options: Options
) -> Path:
    _prepare(plan, folder, fresh=not journal.done)
    batches = list(_batches(plan))
    with shown(options.progress, sum(batch.nbytes for batch in batches)) as progress:
        left = []
        for batch in batches:
            if batch.number in journal.done:
                progress.advance(batch.nbytes)
            else:
                left.append(batch)
        _work(plan, folder, left, journal, options, progress)
    done = list(journal.done.values())
    if options.verify_source:
        _check_sources(plan, done)
    _close_archives(plan, folder, done)
    digests = {number: digest for one in done for number, digest in one.digests.items()}
    manifest.write(plan, folder, digests, identity)
    for file in plan.target.files:
        if file.link is None:
            _force(folder / file.path)
    journal.remove()
    return publish(folder, out, plan.source.location.iteration)


def _prepare(plan: Plan, folder: Path, *, fresh: bool) -> None:
    """Make every file, at its size; sparse until it is filled."""
    for file in plan.target.files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.link is not None:
            if not path.exists():
                _link(plan.source.folder / file.link, path)
        elif file.content is not None:
            path.write_bytes(file.content)
        elif fresh or not path.exists():
            with path.open("xb" if fresh else "wb") as new:
                new.truncate(file.size)


def _link(source: Path, path: Path) -> None:
    try:
        path.hardlink_to(source.resolve())
    except OSError as fault:
        if fault.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copyfile(source, path)  # another file system: the bytes are needed here
        _force(path)


def _force(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _batches(plan: Plan) -> Iterator[Batch]:
    number, jobs, size = 0, [], 0
    for i, job in enumerate(plan.jobs):
        jobs.append(i)
        size += job.nbytes
        if size >= _BATCH:
            yield Batch(number, tuple(jobs), nbytes=size)
            number, jobs, size = number + 1, [], 0
    if jobs:
        yield Batch(number, tuple(jobs), nbytes=size)
        number += 1
    for i, file in enumerate(plan.target.files):
        for k, kept in enumerate(file.kept):
            yield Batch(number, copy=(i, k), nbytes=kept.length)
            number += 1


_worker: Worker | None = None


def _start(plan: Plan, folder: Path, memory: int, lifeline: Lifeline) -> None:
    global _worker
    lifeline.hold()
    _worker = Worker(plan, folder, memory)


def _run(batch: Batch) -> Done:
    assert _worker is not None
    return _worker.run(batch)


def _work(
    plan: Plan,
    folder: Path,
    batches: list[Batch],
    journal: Journal,
    options: Options,
    progress: Progress,
) -> None:
    """Run batches in worker processes; note them in the journal as they get to disk."""
    count = max(min(options.workers, len(batches)), 1)
    memory = max(options.max_ram // (4 * count), 1 << 16)
    with _Flushing(plan, folder, journal) as flushing:

        def finished(done: Done) -> None:
            progress.advance(done.nbytes)
            flushing.add(done)

        worker = Worker(plan, folder, memory)
        try:
            if count == 1 or sum(batch.nbytes for batch in batches) < _BATCH:
                for batch, following in zip_longest(batches, batches[1:]):
                    if following:
                        worker.expect(following)
                    finished(worker.run(batch))
            else:
                _in_processes(plan, folder, batches, count, memory, worker.expect, finished)
        finally:
            worker.close()


class _Flushing:
    """Forces finished batches to disk from time to time, in a thread, and notes them."""

    def __init__(self, plan: Plan, folder: Path, journal: Journal) -> None:
        self._call = partial(_flush, plan, folder, journal)
        self._waiting: list[Done] = []
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None
        self._flushed = time.monotonic()

    def __enter__(self) -> _Flushing:
        return self

    def add(self, done: Done) -> None:
        """Take a finished batch."""
        self._waiting.append(done)
        busy = self._running is not None and not self._running.done()
        if not busy and time.monotonic() - self._flushed > _FLUSH_S:
            self._start()

    def _start(self) -> None:
        if self._running is not None:
            self._running.result()
        waiting, self._waiting = self._waiting, []
        self._running = self._thread.submit(self._call, waiting)
        self._flushed = time.monotonic()

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self._waiting:
                self._start()
            if self._running is not None:
                self._running.result()
        finally:
            self._thread.shutdown()


def _in_processes(plan, folder, batches, count, memory, expect, finished) -> None:  # type: ignore[no-untyped-def]
    # Forked: workers share the plan, which may be big, without a copy.
    context = multiprocessing.get_context("fork")
    left = iter(batches)
    try:
        with (
            Lifeline() as lifeline,
            ProcessPoolExecutor(count, context, _start, (plan, folder, memory, lifeline)) as pool,
        ):
            running: set[Future[Done]] = set()
            try:
                for batch in left:
                    expect(batch)  # while earlier batches are at work
                    running.add(pool.submit(_run, batch))
                    if len(running) < 2 * count:
                        continue
                    ready, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in ready:
                        finished(future.result())
                for future in running:
                    finished(future.result())
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    except BrokenProcessPool as fault:
        raise CheckpointError(
            f"{folder}: a worker process was killed (out of memory?). Nothing was published; run "
            "again with --resume, perhaps with fewer --workers or a smaller --max-ram"
        ) from fault


def _flush(plan: Plan, folder: Path, journal: Journal, waiting: list[Done]) -> None:
    """Force the bytes of finished batches to disk, then note the batches."""
    touched = {plan.target.records[p.record].file for done in waiting for p in done.written}
    touched |= {plan.target.records[r].file for done in waiting for r in done.scattered}
    if any(not done.digests for done in waiting):
        touched |= {i for i, file in enumerate(plan.target.files) if file.kept}
    for number in sorted(touched):
        _force(folder / plan.target.files[number].path)
    journal.add(waiting)


def _pieces(done: list[Done], attribute: str) -> dict[int, list[tuple[int, int, int]]]:
    by_record: dict[int, dict[tuple[int, int], int]] = defaultdict(dict)
    for one in done:
        for record, offset, length, value in getattr(one, attribute):
            by_record[record][offset, length] = value
    return {
        record: [(*place, value) for place, value in pieces.items()]
        for record, pieces in by_record.items()
    }


def _check_sources(plan: Plan, done: list[Done]) -> None:
    """Compare the CRC of what was read with what was stored when the source was written.

    Raises:
        CheckpointError: Bytes of a record have changed since.
    """
    files = Files(plan.source.folder, os.O_RDONLY)
    pieces = _pieces(done, "read")
    try:
        for number in sorted({e.record for job in plan.jobs for e in job.sources}):
            record = plan.source.tensors.records[number]
            base, stored, size = files.data_of(record)
            found = pieces.get(number, [])
            if size != record.nbytes:
                continue  # a view of a bigger storage, of which a part was read
            fd, where = files.fd(record.path), str(plan.source.folder / record.path)
            for offset, length in list(gaps_in(found, size)):
                found.append((offset, length, crc_of(fd, base + offset, length, where)))
            if crc.joined(found, size, gaps_are_zero=False) != stored:
                raise CheckpointError(
                    f"{where}: {record.label}: its bytes do not match their CRC: they have changed "
                    "since it was written. Restore the file from a copy, or take another iteration"
                )
    finally:
        files.close()


def _close_archives(plan: Plan, folder: Path, done: list[Done]) -> None:
    """Write headers and directories of new archives, now that the CRCs are known."""
    pieces = _pieces(done, "written")
    scattered = {record for one in done for record in one.scattered}
    by_archive: dict[tuple[int, int], dict[str, int]] = defaultdict(dict)
    files = Files(folder, os.O_RDWR)
    for number, record in enumerate(plan.target.records):
        size = record.numel * record.dtype.itemsize
        path = plan.target.files[record.file].path
        if number in scattered:
            value = crc_of(files.fd(path), record.offset, size, path)
        else:
            value = crc.joined(pieces.get(number, []), size, gaps_are_zero=True) or 0
        by_archive[record.file, record.archive][record.member] = value
    for number, file in enumerate(plan.target.files):
        for k, skeleton in enumerate(file.archives):
            skeleton.write(files.fd(file.path), by_archive.get((number, k), {}))
    files.close()
