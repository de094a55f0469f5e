"""Which chunks of a ``torch_dist`` target are taken over, which are new, and in what files.

A chunk whose bytes the source holds in one record is not written again: if nearly all of a source
file is taken over it is hard-linked as it is, else its archives are copied whole.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from megatron_moe.tools.checkpoint.model.atoms import AtomId, Extent, Part
from megatron_moe.tools.checkpoint.model.boxes import Shape
from megatron_moe.tools.checkpoint.plan.output import Kept, NewArchive, OutFile, Target
from megatron_moe.tools.checkpoint.plan.request import Resolved
from megatron_moe.tools.checkpoint.read.opened import Object, Opened
from megatron_moe.tools.checkpoint.read.torch_dist import COMMON, COMMON_OBJECT, METADATA
from megatron_moe.tools.checkpoint.stored import pickles
from megatron_moe.tools.checkpoint.stored.dtypes import DType

_MODULE = "torch.distributed.checkpoint.metadata"
_FILES = "torch.distributed.checkpoint.filesystem"
_LIVE_SHARE = 0.9  # of a linked file's bytes that must be in use
_Place = tuple[str, Shape | None]


class Keeper:
    """Takes the target's chunks and objects in, and gives the finished files out.

    Args:
        source: Where bytes may be taken over from.
        to: The target.
    """

    def __init__(self, source: Opened, to: Resolved) -> None:
        self.source, self.to = source, to
        self._known = _signatures(source) if source.location.form == "torch_dist" else {}
        self._kept: dict[str, list[tuple[_Place, Object]]] = defaultdict(list)
        self._new: dict[int, list[tuple[_Place, Any]]] = defaultdict(list)
        self._common: dict[str, Any] = {}

    def chunk(
        self,
        dist: Any,
        key: str,
        start: Shape,
        shape: Shape,
        dtype: DType,
        rank: int,
        parts: list[tuple[str, Part]],
        gaps: int = 0,
    ) -> None:
        """Place one chunk: taken over, or new in the file of ``rank``.

        ``gaps`` are the elements that no part may cover: alignment of flat buffers.
        """
        target: Target = dist.target
        # torch restores a chunk in the shape it was pickled in, so the shape must be the same too.
        signature = (dtype.name, shape, _signature(parts))
        record = self._known.get(signature)
        if record is not None:
            stored = self.source.tensors.records[record]
            assert stored.archive is not None
            place = Object(stored.path, *stored.archive)
            self._kept[stored.path].append(((key, start), place))
            for role, part in parts:
                extent = Extent(record, part.start, part.shape, part.offset, part.strides)
                target.kept_atoms.setdefault(AtomId(part.name, role), []).append(extent)
                target.shapes[AtomId(part.name, role)] = part.whole
            return
        self._new[rank].append(((key, start), (dtype, shape, parts, gaps)))

    def object(self, dist: Any, key: str, value: Any, rank: int) -> None:
        """Place a new object."""
        self._new[rank].append(((key, None), value))

    def old_object(self, dist: Any, key: str, place: Object) -> None:
        """Take an object over."""
        self._kept[place.path].append(((key, None), place))

    def common(self, dist: Any, common: dict[str, Any]) -> None:
        """Place what all ranks share."""
        if self.to.dialect == "0.19":
            self.object(dist, COMMON_OBJECT, common, 0)
        else:
            self._common = common

    def finish(self, dist: Any) -> Target:
        """Lay out the files and write the metadata that points into them."""
        target: Target = dist.target
        places: dict[_Place, Object] = {}
        taken = self._take_over(target, places)
        for rank, entries in sorted(self._new.items()):
            name = f"__{rank}_0.distcp"
            number = 0
            while name in taken:
                number += 1
                name = f"__{rank}_{number}.distcp"
            target.files.append(OutFile(name))
            for place, content in entries:
                places[place] = _new_archive(target, place[0], content)
        if self._common:
            target.files.append(OutFile(COMMON))
            NewArchive(target, len(target.files) - 1, "common").finish(self._common)
        target.text(METADATA, _metadata(dist._tensors, places))
        facts: dict[str, Any] = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        if self.to.dialect != "0.19":
            facts |= {"common_backend": "torch", "common_backend_version": 1}
        target.text("metadata.json", json.dumps(facts).encode())
        return target

    def _take_over(self, target: Target, places: dict[_Place, Object]) -> set[str]:
        archives = {
            path: {(place.offset, place.length) for _, place in entries}
            for path, entries in self._kept.items()
        }
        linked = {
            path
            for path, found in archives.items()
            if self.to.links
            and sum(length for _, length in found) >= _LIVE_SHARE * self.source.files[path]
        }
        names, number = set(linked), 0
        for path, entries in sorted(self._kept.items()):
            if path in linked:
                target.files.append(OutFile(path, link=path, size=self.source.files[path]))
                places.update(entries)
                continue
            while f"__{number}_9.distcp" in names:  # the source may be an output of ours
                number += 1
            out = OutFile(f"__{number}_9.distcp")
            names.add(out.path)
            moved = {}
            for offset, length in sorted(archives[path]):
                moved[offset] = out.size
                out.kept.append(Kept(out.size, path, offset, length))
                out.size += length
            target.files.append(out)
            for place, old in entries:
                places[place] = Object(out.path, moved[old.offset], old.length)
        return names


def _new_archive(target: Target, key: str, content: Any) -> Object:
    file = len(target.files) - 1
    out = target.files[file]
    begin = out.size
    new = NewArchive(target, file, "archive")
    if isinstance(content, tuple) and len(content) == 4 and isinstance(content[0], DType):
        dtype, shape, parts, gaps = content
        stored, record = new.tensor(dtype, shape, key)
        for role, part in parts:
            target.put(role, part, record)
        target.records[record].gaps = gaps
        new.finish(stored)
    else:
        new.finish([content])
    return Object(out.path, begin, out.size - begin)


def _signature(parts: list[tuple[str, Part]]) -> frozenset:
    return frozenset((role, p.name, p.start, p.shape, p.offset, p.strides) for role, p in parts)


def _signatures(source: Opened) -> dict[tuple[str, Shape | None, frozenset], int]:
    """What each record of the source holds."""
    by_record: dict[int, list] = defaultdict(list)
    for atom, held in source.tensors.atoms.items():
        for e in (*held.extents, *held.replicas):
            by_record[e.record].append(
                (atom.role, atom.name, e.start, e.shape, e.offset, e.strides)
            )
    records = source.tensors.records
    return {
        (records[number].dtype.name, records[number].shape, frozenset(parts)): number
        for number, parts in by_record.items()
    }


def _size(shape: Shape) -> pickles.Inert:
    size: pickles.Inert = pickles.foreign("torch", "Size")(tuple(shape))
    return size


def _metadata(
    tensors: dict[str, tuple[DType, Shape, list[tuple[Shape, Shape]]]], places: dict[_Place, Object]
) -> bytes:
    """Return the pickle of torch's ``Metadata``."""
    described: dict[str, Any] = {}
    for key, (dtype, shape, chunks) in tensors.items():
        boxes = [
            pickles.made(
                _MODULE, "ChunkStorageMetadata", {"offsets": _size(start), "sizes": _size(size)}
            )
            for start, size in chunks
        ]
        state = {"properties": _properties(dtype), "size": _size(shape), "chunks": boxes}
        described[key] = pickles.made(_MODULE, "TensorStorageMetadata", state)
    storage: dict[Any, Any] = {}
    numbers = {
        (key, start): i
        for key, (_, _, chunks) in tensors.items()
        for i, (start, _) in enumerate(chunks)
    }
    for (key, start), place in places.items():
        index: dict[str, Any] = {"fqn": key, "index": None}
        if start is None:
            described[key] = pickles.made(_MODULE, "BytesStorageMetadata", {})
        else:
            index |= {"index": numbers[key, start], "offset": _size(start)}
        info = {"relative_path": place.path, "offset": place.offset, "length": place.length}
        storage[pickles.made(_MODULE, "MetadataIndex", index)] = pickles.made(
            _FILES, "_StorageInfo", info
        )
    state = {
        "state_dict_metadata": described,
        "planner_data": None,
        "storage_data": storage,
        "storage_meta": None,
        "version": "1.0.0",
    }
    return pickles.dump(pickles.made(_MODULE, "Metadata", state))


def _properties(dtype: DType) -> pickles.Inert:
    """Element type and layout, in the five fields that every version of torch reads."""
    layout = pickles.foreign("torch.serialization", "_get_layout")("torch.strided")
    contiguous = pickles.foreign(_MODULE, "_MEM_FORMAT_ENCODING")(0)
    made = pickles.made(_MODULE, "TensorProperties", {})
    made._state = (pickles.torch_dtype(dtype), layout, False, contiguous, False)
    return made
