"""Bytes of records in open files: runs of a box, read or written with their CRC."""

from __future__ import annotations

import ctypes
import os
import zlib
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.model.atoms import Record
from megatron_moe.tools.checkpoint.model.boxes import Shape
from megatron_moe.tools.checkpoint.stored import archive, pickles
from megatron_moe.tools.checkpoint.stored.pickles import StoredTensor


class Piece(NamedTuple):
    """A run of bytes of a record with its CRC-32."""

    record: int
    offset: int
    length: int
    crc: int


class Files:
    """Open files of a folder, by relative path; each opened once in a process."""

    def __init__(self, root: Path, flags: int) -> None:
        self.root, self.flags = root, flags
        self._open: dict[str, int] = {}
        self._archives: dict[str, archive.Archive] = {}

    def fd(self, path: str) -> int:
        """Return the descriptor of a file."""
        if path not in self._open:
            self._open[path] = os.open(self.root / path, self.flags)
        return self._open[path]

    def data_of(self, record: Record) -> tuple[int, int, int]:
        """Find a record's bytes.

        Returns:
            Offset in its file, first element's offset there included, and CRC and size of the
            whole stored record.

        Raises:
            CheckpointError: It is not there, or of another size.
        """
        fd = self.fd(record.path)
        where = f"{self.root / record.path} ({record.label})"
        if record.archive is None:
            if record.path not in self._archives:
                size = os.fstat(fd).st_size
                self._archives[record.path] = archive.open_archive(
                    fd, 0, size, str(self.root / record.path)
                )
            opened = self._archives[record.path]
        else:
            opened = archive.open_archive(fd, *record.archive, where)
        member = opened.members.get(f"data/{record.key}")
        if member is None:
            raise CheckpointError(f"{where}: has no record data/{record.key}: damaged")
        if record.archive is not None and member.size != record.nbytes:
            return self._view(fd, opened, record, where), member.crc, member.size
        return member.offset, member.crc, member.size

    def _view(self, fd: int, opened: archive.Archive, record: Record, where: str) -> int:
        """A chunk saved as a view of a bigger storage: its pickle says where it starts."""
        stored = pickles.load(archive.read_member(fd, opened, "data.pkl"), where)
        if not isinstance(stored, StoredTensor) or stored.numel != record.numel:
            raise CheckpointError(
                f"{where}: holds {stored!r}, the metadata says {record.numel} elements: the file "
                "and its metadata are of different saves"
            )
        member = opened.members[f"data/{stored.storage.key}"]
        return member.offset + stored.offset * record.dtype.itemsize

    def close(self) -> None:
        """Close every file."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()


def runs(shape: Shape, strides: Shape) -> tuple[list[int], int]:
    """Order dimensions as a file has them, and count the innermost contiguous ones.

    Returns:
        Dimensions by falling stride, and how many of the last of them form one run of bytes.
    """
    order = sorted(
        range(len(shape)), key=lambda d: (-strides[d], d) if shape[d] > 1 else (-(2**62), d)
    )
    inner, step = 0, 1
    for d in reversed(order):
        if shape[d] > 1 and strides[d] != step:
            break
        step *= shape[d]
        inner += 1
    return order, inner


def pread_into(fd: int, view: memoryview, offset: int, where: str) -> None:
    """Fill a buffer from a file.

    Raises:
        CheckpointError: The file ends before.
    """
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset + done)
        if not got:
            raise CheckpointError(f"{where}: truncated: it ends at byte {offset + done}")
        done += got


def pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    """Write a whole buffer."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


_FETCH = 1 << 20  # bytes asked for at once; the kernel cuts longer requests off


def fetch(fd: int, offset: int, size: int) -> None:
    """Have the kernel read a stretch of a file into its cache; does not wait for it."""
    if hasattr(os, "posix_fadvise"):
        for at in range(offset, offset + size, _FETCH):
            length = min(_FETCH, offset + size - at)
            os.posix_fadvise(fd, at, length, os.POSIX_FADV_WILLNEED)


def send(fd: int, offset: int, size: int) -> None:
    """Have the kernel write a stretch to disk now, so that a later fsync finds little to do."""
    if _sync_file_range is not None and size >= _FETCH // 4:
        _sync_file_range(fd, offset, size, 2)  # SYNC_FILE_RANGE_WRITE: start, do not wait


def _kernel_call() -> Callable[[int, int, int, int], int] | None:
    """Return Linux's ``sync_file_range``; None elsewhere. A hint: its result does not matter."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call


_sync_file_range = _kernel_call()


def read_box(
    fd: int, base: int, first: int, strides: Shape, out: np.ndarray, where: str
) -> tuple[int, int, int] | None:
    """Read a box of a record into an array.

    Args:
        fd: File.
        base: Byte at which the record's data start.
        first: Element of the record at which the box starts.
        strides: Of the box in the record, in elements.
        out: Filled; any strides of its own.
        where: For errors.

    Returns:
        Byte offset, length and CRC of the run, where it is one.
    """
    size = out.dtype.itemsize
    order, inner = runs(out.shape, strides)
    if inner == len(order):
        flat = out.transpose(order)
        target = flat if flat.flags.c_contiguous else np.empty(flat.shape, out.dtype)
        view = memoryview(target.reshape(-1)).cast("B")
        pread_into(fd, view, base + first * size, where)
        if target is not flat:
            flat[...] = target
        return first * size, len(view), zlib.crc32(view)
    span = 1 + sum((n - 1) * s for n, s in zip(out.shape, strides, strict=True))
    held = np.empty(span, out.dtype)
    pread_into(fd, memoryview(held).cast("B"), base + first * size, where)
    steps = [s * size for s in strides]
    out[...] = np.lib.stride_tricks.as_strided(held, out.shape, steps)
    return None


def write_box(
    fd: int, base: int, first: int, strides: Shape, data: np.ndarray, crc: int | None = None
) -> tuple[int, int, int] | None:
    """Write an array into a box of a record.

    Args:
        fd: File.
        base: Byte at which the record's data start.
        first: Element of the record at which the box starts.
        strides: Of the box in the record, in elements.
        data: What is written.
        crc: CRC-32 of its bytes, where it is known already.

    Returns:
        As :func:`read_box`.
    """
    size = data.dtype.itemsize
    order, inner = runs(data.shape, strides)
    turned = data.transpose(order)
    if inner == len(order):
        view = memoryview(np.ascontiguousarray(turned).reshape(-1)).cast("B")
        pwrite_all(fd, view, base + first * size)
        send(fd, base + first * size, len(view))
        return first * size, len(view), zlib.crc32(view) if crc is None else crc
    outer = len(order) - inner
    for index in product(*(range(turned.shape[d]) for d in range(outer))):
        at = first + sum(i * strides[order[d]] for d, i in enumerate(index))
        view = memoryview(np.ascontiguousarray(turned[index]).reshape(-1)).cast("B")
        pwrite_all(fd, view, base + at * size)
    return None


def crc_of(fd: int, offset: int, size: int, where: str) -> int:
    """Return the CRC-32 of a stretch of a file, read in blocks."""
    crc = 0
    block = bytearray(min(size, 1 << 22))
    for at in range(0, size, len(block) or 1):
        view = memoryview(block)[: min(len(block), size - at)]
        pread_into(fd, view, offset + at, where)
        crc = zlib.crc32(view, crc)
    return crc


def gaps_in(pieces: list[tuple[int, int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Yield ``(offset, bytes)`` of what no piece covers."""
    at = 0
    for offset, length, _ in sorted(pieces):
        if offset > at:
            yield at, offset - at
        at = max(at, offset + length)
    if at < size:
        yield at, size - at
