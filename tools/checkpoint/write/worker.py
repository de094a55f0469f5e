"""What a worker process does: move atoms in row blocks, and copy archives."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.model.atoms import Extent
from megatron_moe.tools.checkpoint.model.boxes import row_major
from megatron_moe.tools.checkpoint.plan.compile import Job, Plan
from megatron_moe.tools.checkpoint.read.values import (
    BLOCK,
    AtomReader,
    inner_offset,
    part_of,
    row_blocks,
    window,
)
from megatron_moe.tools.checkpoint.stored.records import Files, Piece, fetch, send, write_box


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
        self.reader = AtomReader(plan.source)
        self.targets = Files(folder, os.O_RDWR)

    def expect(self, batch: Batch) -> None:
        """Have the kernel fetch what a batch will read."""
        for number in batch.jobs:
            self.reader.expect(self.plan.jobs[number].sources)

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
        source, target = self.reader.files.fd(kept.path), self.targets.fd(out.path)
        fetch(source, kept.source_offset, kept.length)
        moved = 0
        while moved < kept.length:
            moved += _copy_range(
                source, target, kept.length - moved, kept.source_offset + moved, kept.offset + moved
            )
        send(target, kept.offset, kept.length)

    def _move(self, job: Job, done: Done) -> str:
        digest = xxhash.xxh3_128()
        carrier = np.dtype(f"<u{job.itemsize}" if job.itemsize <= 8 else "<c16")
        limit = min(BLOCK, self.memory)
        for first, last in row_blocks(job.shape, job.itemsize, [*job.sources, *job.targets], limit):
            # Zeros: what the source has not, rows of a longer vocabulary.
            buffer = np.zeros((last - first, *job.shape[1:]), carrier)
            crc = None  # of the block, where it was read in one run
            for extent in job.sources:
                if piece := self.reader.fill(extent, first, buffer):
                    done.read.append(piece)
                    if piece.length == buffer.nbytes and _in_order(extent):
                        crc = piece.crc
            digest.update(memoryview(buffer.reshape(-1)).cast("B"))
            for extent in job.targets:
                self._write(extent, first, buffer, crc, done)
        return digest.hexdigest()

    def _write(
        self, extent: Extent, first: int, buffer: np.ndarray, crc: int | None, done: Done
    ) -> None:
        found = part_of(extent, first, buffer.shape)
        if found is None:
            return
        start, shape = found
        record = self.plan.target.records[extent.record]
        at = extent.offset + inner_offset(start, extent)
        path = self.plan.target.files[record.file].path
        data = window(buffer, start, shape, first)
        known = crc if data.shape == buffer.shape and _in_order(extent) else None
        piece = write_box(self.targets.fd(path), record.offset, at, extent.strides, data, known)
        if piece:
            done.written.append(Piece(extent.record, *piece))
        else:
            done.scattered.add(extent.record)

    def close(self) -> None:
        """Close every file."""
        self.reader.files.close()
        self.targets.close()


def _in_order(extent: Extent) -> bool:
    """Whether an extent's elements lie in its record as they do in the atom, without gaps."""
    return extent.strides == row_major(extent.shape)


def _copy_range(source: int, target: int, length: int, at: int, to: int) -> int:
    """Copy bytes inside the kernel, sharing blocks where the file system can."""
    try:
        copied = os.copy_file_range(source, target, length, at, to)
        if copied:
            return copied
    except OSError:
        pass  # other file systems, old kernels: the plain way says what is wrong, if anything is
    data = os.pread(source, min(length, BLOCK), at)
    if not data:
        raise CheckpointError(
            f"a file of the source ends before byte {at}, which was there when it was opened: it "
            "has changed since"
        )
    return os.pwrite(target, data, to)
