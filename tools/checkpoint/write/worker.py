"""What a worker process does: move atoms in row blocks, and copy archives."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from megatron_moe.tools.checkpoint.model.atoms import Extent
from megatron_moe.tools.checkpoint.plan.compile import Job, Plan, overlapping
from megatron_moe.tools.checkpoint.write.records import Files, Piece, read_box, write_box

_BLOCK = 8 << 20  # bytes of an atom in memory at a time: fits caches, still one big read


@dataclass
class Done:
    """What a batch did.

    Args:
        batch: Its number.
        nbytes: Bytes of atoms it moved or copied.
        digests: Of each atom: xxh3-128 of its bytes in row-major order.
        read: Runs read from source records.
        written: Runs written to target records.
        scattered: Target records written in other than whole runs.
    """

    batch: int
    nbytes: int = 0
    digests: dict[int, str] = field(default_factory=dict)
    read: list[Piece] = field(default_factory=list)
    written: list[Piece] = field(default_factory=list)
    scattered: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Batch:
    """Jobs (by their numbers in the plan) or an archive copy, done by one worker at once."""

    number: int
    jobs: tuple[int, ...] = ()
    copy: tuple[int, int] | None = None  # file, number of its kept archive
    nbytes: int = 0


class Worker:
    """Moves atoms of a plan.

    Args:
        plan: What is to be done.
        folder: Where the target's files are, already at their size.
        memory: Bytes for buffers.
    """

    def __init__(self, plan: Plan, folder: Path, memory: int) -> None:
        self.plan, self.memory = plan, memory
        self.sources = Files(plan.source.folder, os.O_RDONLY)
        self.targets = Files(folder, os.O_RDWR)
        self._found: dict[int, int] = {}

    def run(self, batch: Batch) -> Done:
        """Do a batch; doing it again changes nothing."""
        done = Done(batch.number, batch.nbytes)
        if batch.copy is not None:
            self._copy(*batch.copy)
        for number in batch.jobs:
            done.digests[number] = self._move(self.plan.jobs[number], done)
        return done

    def _copy(self, file: int, number: int) -> None:
        out = self.plan.target.files[file]
        kept = out.kept[number]
        source, target = self.sources.fd(kept.path), self.targets.fd(out.path)
        moved = 0
        while moved < kept.length:
            moved += _copy_range(
                source, target, kept.length - moved, kept.source_offset + moved, kept.offset + moved
            )

    def _base(self, record: int) -> int:
        """Byte of the source file at which a record's data start."""
        if record not in self._found:
            self._found[record] = self.sources.data_of(self.plan.source.tensors.records[record])[0]
        return self._found[record]

    def _move(self, job: Job, done: Done) -> str:
        digest = xxhash.xxh3_128()
        shape = job.shape or (1,)
        carrier = np.dtype(f"<u{job.itemsize}" if job.itemsize <= 8 else "<c16")
        row = max(int(np.prod(shape[1:])) * job.itemsize, 1)
        step = max(min(_BLOCK, self.memory) // row, 1)
        if _is_turned(job):
            step = shape[0]
        for first in range(0, shape[0], step):
            last = min(first + step, shape[0])
            buffer = np.zeros((last - first, *shape[1:]), carrier)
            for extent in job.sources:
                self._read(job, extent, first, last, buffer, done)
            digest.update(memoryview(buffer.reshape(-1)).cast("B"))
            for extent in job.targets:
                self._write(job, extent, first, last, buffer, done)
        return digest.hexdigest()

    def _read(
        self, job: Job, extent: Extent, first: int, last: int, buffer: np.ndarray, done: Done
    ) -> None:
        found = overlapping(job, first, last, extent)
        if found is None:
            return
        start, shape = found
        record = self.plan.source.tensors.records[extent.record]
        at = extent.offset + _inner(start, extent)
        piece = read_box(
            self.sources.fd(record.path),
            self._base(extent.record),
            at,
            extent.strides,
            _window(buffer, start, shape, first),
            str(self.plan.source.folder / record.path),
        )
        if piece:
            done.read.append(Piece(extent.record, *piece))

    def _write(
        self, job: Job, extent: Extent, first: int, last: int, buffer: np.ndarray, done: Done
    ) -> None:
        found = overlapping(job, first, last, extent)
        if found is None:
            return
        start, shape = found
        record = self.plan.target.records[extent.record]
        at = extent.offset + _inner(start, extent)
        path = self.plan.target.files[record.file].path
        data = _window(buffer, start, shape, first)
        piece = write_box(self.targets.fd(path), record.offset, at, extent.strides, data)
        if piece:
            done.written.append(Piece(extent.record, *piece))
        else:
            done.scattered.add(extent.record)

    def close(self) -> None:
        """Close every file."""
        self.sources.close()
        self.targets.close()


def _inner(start: tuple[int, ...], extent: Extent) -> int:
    return sum((a - b) * s for a, b, s in zip(start, extent.start, extent.strides, strict=True))


def _window(
    buffer: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...], first: int
) -> np.ndarray:
    """The part of a block of rows that a box covers."""
    if not shape:
        return buffer.reshape(())
    rows = slice(start[0] - first, start[0] - first + shape[0])
    rest = (slice(s, s + n) for s, n in zip(start[1:], shape[1:], strict=True))
    return buffer[(rows, *rest)]


def _is_turned(job: Job) -> bool:
    """Whether rows of the atom are not rows of some file: then it is held whole."""
    return any(
        len(e.strides) > 1 and e.strides[0] < e.strides[-1] for e in (*job.sources, *job.targets)
    )


def _copy_range(source: int, target: int, length: int, at: int, to: int) -> int:
    """Copy bytes inside the kernel, sharing blocks where the file system can."""
    try:
        copied = os.copy_file_range(source, target, length, at, to)
        if copied:
            return copied
    except OSError:
        pass  # other file systems, old kernels: the plain way says what is wrong, if anything is
    data = os.pread(source, min(length, _BLOCK), at)
    if not data:
        raise EOFError(f"byte {at} lies behind the end of the file")
    return os.pwrite(target, data, to)
