"""The target as data: files, the archives in them, and where each atom's bytes go."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

from megatron_moe.tools.checkpoint.model.atoms import AtomId, Extent, Part
from megatron_moe.tools.checkpoint.model.boxes import Shape, row_major
from megatron_moe.tools.checkpoint.stored import archive
from megatron_moe.tools.checkpoint.stored.archive import Skeleton
from megatron_moe.tools.checkpoint.stored.dtypes import DType
from megatron_moe.tools.checkpoint.stored.pickles import Literal, Storage, StoredTensor


@dataclass(slots=True)
class OutRecord:
    """A record to be filled.

    Args:
        file: Number of its file.
        archive: Number of its archive in the file.
        member: Name in the archive.
        offset: Of its bytes in the file.
        dtype: Element type.
        numel: Elements.
        label: What it holds.
        gaps: Elements that stay zero, by design: alignment of flat buffers.
    """

    file: int
    archive: int
    member: str
    offset: int
    dtype: DType
    numel: int
    label: str
    gaps: int = 0


@dataclass(slots=True)
class Kept:
    """Bytes of a source file taken over unchanged: a whole archive."""

    offset: int
    path: str
    source_offset: int
    length: int


@dataclass(slots=True)
class OutFile:
    """A file to be written.

    Args:
        path: Relative to the new checkpoint.
        archives: New archives in it.
        kept: Archives taken over.
        link: Source file that it is, unchanged; then nothing else holds.
        size: In bytes.
        content: Whole content, of small files.
    """

    path: str
    archives: list[Skeleton] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    link: str | None = None
    size: int = 0
    content: bytes | None = None


@dataclass
class Drop:
    """Something of the source that the target does not get."""

    what: str
    reason: str
    elements: int = 0


@dataclass
class Target:
    """Everything that will be written.

    Args:
        files: In order.
        records: To be filled from atoms.
        shapes: Of atoms in the target (the vocabulary may differ from the source's).
        atoms: Where each atom goes; several places for replicas.
        sources: Atom of the source that fills an atom of another role: fp32 masters from weights.
        dropped: What is left out.
        notes: What the user should know.
    """

    files: list[OutFile] = field(default_factory=list)
    records: list[OutRecord] = field(default_factory=list)
    shapes: dict[AtomId, Shape] = field(default_factory=dict)
    atoms: dict[AtomId, list[Extent]] = field(default_factory=dict)
    sources: dict[AtomId, AtomId] = field(default_factory=dict)
    kept_atoms: dict[AtomId, list[Extent]] = field(default_factory=dict)
    dropped: list[Drop] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def put(self, role: str, part: Part, record: int) -> None:
        """Send a part of an atom to a record."""
        atom = AtomId(part.name, role)
        self.shapes[atom] = part.whole
        extent = Extent(record, part.start, part.shape, part.offset, part.strides)
        self.atoms.setdefault(atom, []).append(extent)

    def text(self, path: str, content: bytes) -> None:
        """Add a small file."""
        self.files.append(OutFile(path, content=content, size=len(content)))


class NewArchive:
    """Builds one archive of `torch.save`: give it tensors, then the object that holds them."""

    def __init__(self, target: Target, file: int, root: str) -> None:
        self.target, self.file, self.root = target, file, root
        # Of each storage: bytes, then its record's number or its content.
        self._pending: list[tuple[int, int | bytes]] = []

    def tensor(self, dtype: DType, shape: Shape, label: str) -> tuple[StoredTensor, int]:
        """Reserve a tensor; return its placeholder and the number of its record."""
        number = len(self.target.records)
        stored = self._reserve(dtype, shape, number)
        key, numel = stored.storage.key, stored.storage.numel
        record = OutRecord(self.file, -1, f"data/{key}", 0, dtype, numel, label)
        self.target.records.append(record)
        return stored, number

    def _reserve(self, dtype: DType, shape: Shape, content: int | bytes) -> StoredTensor:
        numel = prod(shape)
        key = str(len(self._pending))
        self._pending.append((numel * dtype.itemsize, content))
        return StoredTensor(Storage(dtype, key, numel), 0, tuple(shape), row_major(tuple(shape)))

    def _placed(self, thing: Any) -> Any:
        """Give small tensors that carry their bytes a record each."""
        if isinstance(thing, Literal):
            return self._reserve(thing.dtype, thing.shape, thing.data)
        if isinstance(thing, dict):
            return type(thing)((key, self._placed(value)) for key, value in thing.items())
        if type(thing) in (list, tuple):
            return type(thing)(self._placed(item) for item in thing)
        return thing

    def finish(self, thing: Any) -> Skeleton:
        """Lay the archive out at the end of its file."""
        out = self.target.files[self.file]
        skeleton = archive.begin(self._placed(thing), self.root, out.size)
        for key, (nbytes, content) in enumerate(self._pending):
            inline = content if isinstance(content, bytes) else None
            offset = skeleton.add(f"data/{key}", nbytes, inline)
            if isinstance(content, int):
                record = self.target.records[content]
                record.archive, record.offset = len(out.archives), offset
        archive.close(skeleton)
        out.archives.append(skeleton)
        out.size += skeleton.total()
        return skeleton
