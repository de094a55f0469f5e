"""What a checkpoint holds beside tensors: pickled objects and small records, by their CRC."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.read.opened import Opened
from megatron_moe.tools.checkpoint.stored import archive


def damaged(opened: Opened) -> Iterator[tuple[str, str, str]]:
    """Yield ``(file, what, cause)`` of every object that is not what was written.

    Cost: reads them all; they are small.
    """
    if opened.location.form == "torch_dist":
        yield from _objects(opened)
    else:
        yield from _small_records(opened)


def _objects(opened: Opened) -> Iterator[tuple[str, str, str]]:
    by_file: dict[str, list[str]] = defaultdict(list)
    for key, place in opened.objects.items():
        by_file[place.path].append(key)
    for path, keys in sorted(by_file.items()):
        fd = os.open(opened.folder / path, os.O_RDONLY)
        try:
            for key in keys:
                place = opened.objects[key]
                yield from _archive(fd, place.offset, place.length, path, key, set())
        finally:
            os.close(fd)


def _small_records(opened: Opened) -> Iterator[tuple[str, str, str]]:
    """Records of legacy files that no tensor of the model or the optimizer lies in."""
    known: dict[str, set[str]] = defaultdict(set)
    for record in opened.tensors.records:
        known[record.path].add(f"data/{record.key}")
    for path in sorted(known):
        fd = os.open(opened.folder / path, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            yield from _archive(fd, 0, size, path, Path(path).name, known[path])
        finally:
            os.close(fd)


def _archive(
    fd: int, start: int, length: int, path: str, what: str, known: set[str]
) -> Iterator[tuple[str, str, str]]:
    try:
        opened = archive.open_archive(fd, start, length, path)
    except CheckpointError as fault:
        yield path, what, str(fault)
        return
    for name in opened.members:
        if name not in known:
            try:
                archive.read_member(fd, opened, name)
            except CheckpointError as fault:
                yield path, what, str(fault)
