"""Change tensors of a checkpoint in place, as faults before, during or after its save do."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_moe.tools.checkpoint.model.atoms import AtomId
from megatron_moe.tools.checkpoint.read.open import open_checkpoint
from megatron_moe.tools.checkpoint.stored import archive

Edit = Callable[[np.ndarray], None]


def edit_atom(folder: Path, atom: AtomId, edit: Edit, *, extent: int = 0, crc: bool = True) -> str:
    """Change an atom's part in its file, as a fault before the save would have.

    Args:
        folder: Checkpoint.
        atom: Which atom.
        edit: Called with the part's elements (one run), as unsigned integers; changes them.
        extent: Which part of it; replicas follow first copies.
        crc: Whether the record's CRC follows, so that only the content is wrong.

    Returns:
        The changed file, relative to the iteration's folder.
    """
    opened = open_checkpoint(folder)
    held = opened.tensors.atoms[atom]
    part = [*held.extents, *held.replicas][extent]
    record = opened.tensors.records[part.record]
    path = opened.folder / record.path
    with path.open("r+b") as file:
        fd = file.fileno()
        start, length = record.archive or (0, path.stat().st_size)
        member = archive.open_archive(fd, start, length, str(path)).members[f"data/{record.key}"]
        old = os.pread(fd, member.size, member.offset)
        values = np.frombuffer(bytearray(old), held.dtype.carrier)
        box = np.lib.stride_tricks.as_strided(
            values[part.offset :], part.shape, [s * held.dtype.itemsize for s in part.strides]
        )
        edit(box)
        new = values.tobytes()
        os.pwrite(fd, new, member.offset)
        if crc:
            _replace_crc(fd, start, length, zlib.crc32(old), zlib.crc32(new), f"data/{record.key}")
    return record.path


def _replace_crc(fd: int, start: int, length: int, old: int, new: int, name: str) -> None:
    """Put a record's new CRC in its local header and in the directory, found by name."""
    whole = bytearray(os.pread(fd, length, start))
    at = whole.find(b"PK")
    while at >= 0:
        kind = bytes(whole[at : at + 4])
        crc, size, names = {
            b"PK\x03\x04": (14, 26, 30), b"PK\x01\x02": (16, 28, 46)
        }.get(kind, (0, 0, 0))  # fmt: skip
        if crc:
            count = int.from_bytes(whole[at + size : at + size + 2], "little")
            full = bytes(whole[at + names : at + names + count]).decode(errors="replace")
            if full.partition("/")[2] == name:
                assert int.from_bytes(whole[at + crc : at + crc + 4], "little") == old
                os.pwrite(fd, new.to_bytes(4, "little"), start + at + crc)
        at = whole.find(b"PK", at + 1)
