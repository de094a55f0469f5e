"""Values of atoms, read in row blocks: for moving, for checksums, for comparison."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
import xxhash

from megatron_moe.tools.checkpoint.model.atoms import Extent, Held
from megatron_moe.tools.checkpoint.model.boxes import Shape, overlap
from megatron_moe.tools.checkpoint.read.opened import Opened
from megatron_moe.tools.checkpoint.stored.records import Files, Piece, fetch, read_box

BLOCK = 8 << 20  # bytes of an atom in memory at a time: fits caches, still one big read


class AtomReader:
    """Reads atoms of a checkpoint; closes its files at the end of a ``with`` block."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.files = Files(opened.folder, os.O_RDONLY)
        self._bases: dict[int, int] = {}

    def __enter__(self) -> AtomReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()

    def fill(self, extent: Extent, first: int, buffer: np.ndarray) -> Piece | None:
        """Fill what an extent holds of the rows ``first, first + 1, ...`` of an atom.

        Args:
            extent: Part of the atom.
            first: Row of the atom that is row 0 of the buffer.
            buffer: Rows of the atom.

        Returns:
            The run of bytes that was read, if it is one.
        """
        found = part_of(extent, first, buffer.shape)
        if found is None:
            return None
        start, shape = found
        record = self.opened.tensors.records[extent.record]
        run = read_box(
            self.files.fd(record.path),
            self._base(extent.record),
            extent.offset + inner_offset(start, extent),
            extent.strides,
            window(buffer, start, shape, first),
            str(self.opened.folder / record.path),
        )
        return Piece(extent.record, *run) if run else None

    def expect(self, extents: Iterable[Extent]) -> None:
        """Have the kernel fetch what will be read soon, while other work goes on."""
        for extent in extents:
            record = self.opened.tensors.records[extent.record]
            size = record.dtype.itemsize
            span = 1 + sum((n - 1) * s for n, s in zip(extent.shape, extent.strides, strict=True))
            # Where a chunk's bytes start in its archive is near enough to the archive's start.
            base = record.archive[0] if record.archive else self._base(extent.record)
            fetch(self.files.fd(record.path), base + extent.offset * size, span * size)

    def _base(self, number: int) -> int:
        if number not in self._bases:
            self._bases[number] = self.files.data_of(self.opened.tensors.records[number])[0]
        return self._bases[number]

    def blocks(self, held: Held, extents: list[Extent] | None = None) -> Iterator[np.ndarray]:
        """Yield an atom's rows in order, as unsigned integers of its element size."""
        extents = held.extents if extents is None else extents
        for first, last in row_blocks(held.shape, held.dtype.itemsize, extents, BLOCK):
            buffer = np.zeros((last - first, *held.shape[1:]), held.dtype.carrier)
            for extent in extents:
                self.fill(extent, first, buffer)
            yield buffer

    def digest(self, held: Held) -> str:
        """Return an atom's checksum, as manifests have it."""
        total = xxhash.xxh3_128()
        for block in self.blocks(held):
            total.update(memoryview(block.reshape(-1)).cast("B"))
        return total.hexdigest()


def row_blocks(
    shape: Shape, itemsize: int, extents: list[Extent], limit: int
) -> Iterator[tuple[int, int]]:
    """Cut an atom's rows into blocks of at most ``limit`` bytes.

    An atom some part of which lies transposed in its file is one block: its rows are not there.
    """
    rows = shape[0] if shape else 1
    row = itemsize
    for size in shape[1:]:
        row *= size
    step = max(limit // max(row, 1), 1)
    if any(len(e.strides) > 1 and e.strides[0] < e.strides[-1] for e in extents):
        step = max(rows, 1)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def part_of(extent: Extent, first: int, block: Shape) -> tuple[Shape, Shape] | None:
    """Return start and shape of what an extent holds of a block of rows; None if nothing."""
    if not extent.shape:
        return (), ()
    return overlap(extent.start, extent.shape, (first, *(0,) * (len(block) - 1)), block)


def inner_offset(start: Shape, extent: Extent) -> int:
    """Return how far into an extent a box starts, in elements of its record."""
    return sum((a - b) * s for a, b, s in zip(start, extent.start, extent.strides, strict=True))


def window(buffer: np.ndarray, start: Shape, shape: Shape, first: int) -> np.ndarray:
    """Return the part of a block of rows that a box covers."""
    if not shape:
        return buffer.reshape(())
    rows = slice(start[0] - first, start[0] - first + shape[0])
    return buffer[(rows, *(slice(s, s + n) for s, n in zip(start[1:], shape[1:], strict=True)))]
