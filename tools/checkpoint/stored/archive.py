"""Zip archives of `torch.save`: where each record's bytes lie, and how to lay out a new one.

Records are stored, never compressed, each starting on a 64-byte boundary of its archive. An
archive may stand alone (legacy files) or inside a bigger file (``.distcp``, one for each chunk).
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.stored import pickles
from megatron_moe.tools.checkpoint.stored.pickles import StoredTensor

_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END64, _LOCATOR64 = b"PK\x06\x06", b"PK\x06\x07"
_ALIGNMENT = 64
_BIG = 0xFFFFFFFF
_UTF8 = 0x0800


@dataclass(frozen=True, slots=True)
class Member:
    """One stored record: where its bytes are in the file."""

    offset: int
    size: int
    crc: int


@dataclass(frozen=True, slots=True)
class Archive:
    """An opened archive.

    Args:
        where: File, for errors.
        members: By name without the leading folder: ``data.pkl``, ``data/0``, ...
    """

    where: str
    members: dict[str, Member]


def read_at(fd: int, offset: int, size: int, where: str) -> bytes:
    """Read exactly ``size`` bytes.

    Raises:
        CheckpointError: The file ends before.
    """
    data = os.pread(fd, size, offset)
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            raise CheckpointError(
                f"{where}: truncated: {size} bytes wanted at {offset}, "
                f"the file ends after {len(data)} of them. Restore it from a copy"
            )
        data += more
    return data


def open_archive(fd: int, start: int, length: int, where: str) -> Archive:
    """Read an archive's directory; a few reads, none of them of tensor data.

    Raises:
        CheckpointError: No archive is there, it is compressed, damaged, or cut short.
    """
    try:
        return Archive(where, _members(fd, start, length, where))
    except (struct.error, IndexError, UnicodeDecodeError) as fault:
        raise CheckpointError(
            f"{where}: its zip directory is damaged ({fault}). Restore it from a copy"
        ) from fault


def _members(fd: int, start: int, length: int, where: str) -> dict[str, Member]:
    tail_size = min(length, 2048)
    tail = read_at(fd, start + length - tail_size, tail_size, where)
    end = tail.rfind(_END)
    if end < 0 or end + 22 > len(tail):  # 22: an end record without a comment
        raise CheckpointError(
            f"{where}: no zip directory at the end of the {length} bytes at {start}: the file is "
            "truncated, or not written by torch.save. Restore it from a copy"
        )
    count, size, offset = struct.unpack("<HII", tail[end + 10 : end + 20])
    if _BIG in (size, offset) or count == 0xFFFF:
        count, size, offset = _zip64_directory(fd, start, length, tail[:end], where)
    _check_within(offset, size, length, "its zip directory", where)
    directory = read_at(fd, start + offset, size, where)
    members: dict[str, Member] = {}
    for name, data_start, nbytes, crc in _entries(directory, count, where):
        _check_within(data_start, 30, length, f"record {name}", where)
        header = read_at(fd, start + data_start, 30, where)
        if header[:4] != _LOCAL:
            raise CheckpointError(f"{where}: record {name} has no header at {start + data_start}")
        name_size, extra_size = struct.unpack("<HH", header[26:30])
        at = data_start + 30 + name_size + extra_size
        _check_within(at, nbytes, length, f"record {name}", where)
        members[name.partition("/")[2]] = Member(start + at, nbytes, crc)
    return members


def _check_within(offset: int, size: int, length: int, what: str, where: str) -> None:
    if offset + size > length:
        raise CheckpointError(
            f"{where}: {what} lies beyond the end: truncated or damaged. Restore it from a copy"
        )


def _zip64_directory(
    fd: int, start: int, length: int, before: bytes, where: str
) -> tuple[int, int, int]:
    locator = before[-20:]
    if locator[:4] != _LOCATOR64:
        raise CheckpointError(f"{where}: a big archive without its zip64 locator: damaged")
    at = struct.unpack("<Q", locator[8:16])[0]
    _check_within(at, 56, length, "its zip64 directory", where)
    record = read_at(fd, start + at, 56, where)
    if record[:4] != _END64:
        raise CheckpointError(f"{where}: a big archive without its zip64 directory: damaged")
    count, size, offset = struct.unpack("<QQQ", record[32:56])
    return count, size, offset


def _entries(directory: bytes, count: int, where: str) -> Any:
    at = 0
    for _ in range(count):
        if directory[at : at + 4] != _CENTRAL:
            raise CheckpointError(f"{where}: its zip directory is damaged")
        method = struct.unpack_from("<H", directory, at + 10)[0]
        crc, packed, size, name_size, extra_size, note_size = struct.unpack_from(
            "<IIIHHH", directory, at + 16
        )
        offset = struct.unpack_from("<I", directory, at + 42)[0]
        name = directory[at + 46 : at + 46 + name_size].decode()
        if method:
            raise CheckpointError(f"{where}: record {name} is compressed; torch.save stores")
        extra = directory[at + 46 + name_size : at + 46 + name_size + extra_size]
        if _BIG in (size, packed, offset):
            size, offset = _zip64_fields(extra, size, packed, offset)
        yield name, offset, size, crc
        at += 46 + name_size + extra_size + note_size


def _zip64_fields(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int]:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            values = list(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            size = values.pop(0) if size == _BIG else size
            if packed == _BIG:
                values.pop(0)
            offset = values.pop(0) if offset == _BIG else offset
        at += 4 + length
    return size, offset


def read_member(fd: int, archive: Archive, name: str) -> bytes:
    """Read a whole record and check its CRC.

    Raises:
        CheckpointError: It is missing, cut short, or its CRC differs.
    """
    member = archive.members.get(name)
    if member is None:
        raise CheckpointError(f"{archive.where}: has no record {name}: not written by torch.save")
    data = read_at(fd, member.offset, member.size, archive.where)
    if zlib.crc32(data) != member.crc:
        raise CheckpointError(
            f"{archive.where}: record {name} does not match its CRC: some bytes have changed since "
            "it was written. Restore the file from a copy"
        )
    return data


@dataclass
class Skeleton:
    """A new archive, but for the bytes and CRCs of its big records.

    Args:
        root: Leading folder of every record's name.
        start: Where it begins in its file.
    """

    root: str
    start: int = 0
    names: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # of headers, within the archive
    offsets: list[int] = field(default_factory=list)  # of data, within the archive
    sizes: list[int] = field(default_factory=list)
    inline: dict[str, bytes] = field(default_factory=dict)
    size: int = 0  # so far; the whole once `closed`

    def add(self, name: str, size: int, data: bytes | None = None) -> int:
        """Append a record; return where its bytes start in the file."""
        header = 30 + len(self.root) + 1 + len(name) + (20 if size >= _BIG else 0)
        at = self.size + header + 4  # at least an empty padding field
        offset = -(-at // _ALIGNMENT) * _ALIGNMENT
        self.names.append(name)
        self.starts.append(self.size)
        self.offsets.append(offset)
        self.sizes.append(size)
        if data is not None:
            self.inline[name] = data
        self.size = offset + size
        return self.start + offset

    def total(self) -> int:
        """Return the size of the finished archive, in bytes."""
        return self.size + len(self.directory(dict.fromkeys(self.names, 0)))

    def headers(self, crcs: dict[str, int]) -> list[tuple[int, bytes]]:
        """Return ``(offset in file, bytes)`` of every local header."""
        out = []
        for i, name in enumerate(self.names):
            full = f"{self.root}/{name}".encode()
            size, shown = self.sizes[i], min(self.sizes[i], _BIG)
            extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= _BIG else b""
            padding = self.offsets[i] - self.starts[i] - 30 - len(full) - len(extra) - 4
            extra += struct.pack("<HH", 0x4246, padding) + b"Z" * padding
            fixed = struct.pack(
                "<4sHHHHHIIIHH", _LOCAL, 45 if size >= _BIG else 20, _UTF8, 0, 0, 0x21,
                crcs[name], shown, shown, len(full), len(extra),
            )  # fmt: skip
            out.append((self.start + self.starts[i], fixed + full + extra))
        return out

    def write(self, fd: int, crcs: dict[str, int]) -> None:
        """Write everything but the big records' bytes.

        Args:
            fd: The file.
            crcs: Of the big records, by name.
        """
        crcs = crcs | {name: zlib.crc32(data) for name, data in self.inline.items()}
        at, run = self.start, bytearray()
        for name, size, (offset, header) in zip(
            self.names, self.sizes, self.headers(crcs), strict=True
        ):
            run += header
            if name in self.inline:
                run += self.inline[name]
            else:  # what lies before and behind a big record is one write each
                os.pwrite(fd, run, at)
                at, run = offset + len(header) + size, bytearray()
        os.pwrite(fd, run + self.directory(crcs), at)

    def directory(self, crcs: dict[str, int]) -> bytes:
        """Return the central directory and the end records."""
        out = bytearray()
        for i, name in enumerate(self.names):
            full = f"{self.root}/{name}".encode()
            size, at = self.sizes[i], self.starts[i]
            wide = [value for value in (size, size, at) if value >= _BIG]
            extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
            out += struct.pack(
                "<4sHHHHHHIIIHHHHHII", _CENTRAL, 45, 45 if wide else 20, _UTF8, 0, 0, 0x21,
                crcs[name], min(size, _BIG), min(size, _BIG), len(full), len(extra), 0, 0, 0, 0,
                min(at, _BIG),
            ) + full + extra  # fmt: skip
        count, length = len(self.names), len(out)
        if self.size >= _BIG or count >= 0xFFFF:
            end = self.size + length
            out += struct.pack("<4sQHHIIQQQQ", _END64, 44, 45, 45, 0, 0, count, count, length,
                               self.size)  # fmt: skip
            out += struct.pack("<4sIQI", _LOCATOR64, 0, end, 1)
        out += struct.pack("<4sHHHHIIH", _END, 0, 0, min(count, 0xFFFF), min(count, 0xFFFF),
                           min(length, _BIG), min(self.size, _BIG), 0)  # fmt: skip
        return bytes(out)


@lru_cache(maxsize=1024)
def _pickled(tensor: StoredTensor) -> bytes:
    """A checkpoint has many chunks of few shapes."""
    return pickles.dump(tensor)


def begin(thing: Any, root: str = "archive", start: int = 0) -> Skeleton:
    """Start the archive that `torch.save(thing)` would write, tensors' bytes to follow.

    The caller adds a record ``data/<key>`` for each storage, then calls :func:`close`.
    """
    skeleton = Skeleton(root, start)
    for name, data in (
        ("data.pkl", _pickled(thing) if isinstance(thing, StoredTensor) else pickles.dump(thing)),
        (".format_version", b"1"),
        (".storage_alignment", b"64"),
        ("byteorder", b"little"),
    ):
        skeleton.add(name, len(data), data)
    return skeleton


def close(skeleton: Skeleton) -> Skeleton:
    """Add the last record of every archive."""
    skeleton.add("version", 2, b"3\n")
    return skeleton


def small(thing: Any) -> bytes:
    """Return the bytes of `torch.save(thing)` for something without tensors."""
    skeleton = close(begin(thing))
    crcs = {name: zlib.crc32(data) for name, data in skeleton.inline.items()}
    out = bytearray(skeleton.total())
    for offset, header in skeleton.headers(crcs):
        out[offset : offset + len(header)] = header
    for name, offset in zip(skeleton.names, skeleton.offsets, strict=True):
        out[offset : offset + len(skeleton.inline[name])] = skeleton.inline[name]
    out[skeleton.size :] = skeleton.directory(crcs)
    return bytes(out)


def open_file(path: Path) -> tuple[int, Archive]:
    """Open a file that is one archive; the caller closes the descriptor."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return fd, open_archive(fd, 0, os.fstat(fd).st_size, str(path))
    except BaseException:
        os.close(fd)
        raise
