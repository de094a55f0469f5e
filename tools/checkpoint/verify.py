"""Prove a checkpoint whole, and two checkpoints equal.

Coverage was checked when it was opened. Here: every record against the CRC stored with it, every
replica against the first copy, every fp32 master against the weight it rounds to, every expert
against the others; and atoms of one checkpoint against those of another, by checksums.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from math import prod
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import xxhash

from megatron_moe.tools.checkpoint.model.atoms import (
    MASTER,
    MOMENT2,
    WEIGHT,
    AtomId,
    Extent,
    Held,
)
from megatron_moe.tools.checkpoint.model.boxes import Shape, overlap
from megatron_moe.tools.checkpoint.read import objects
from megatron_moe.tools.checkpoint.read.opened import Opened
from megatron_moe.tools.checkpoint.read.values import AtomReader, inner_offset
from megatron_moe.tools.checkpoint.stored.records import Files, crc_of
from megatron_moe.tools.checkpoint.write import manifest

_MATCH = 0.995  # share of masters that must round to their weight; NaN payloads may differ


class Fault(NamedTuple):
    """Something wrong: file, tensor, cause."""

    file: str
    tensor: str
    cause: str

    def __str__(self) -> str:
        return f"{self.file}: {self.tensor}: {self.cause}"


@dataclass
class Verdict:
    """What was found.

    Args:
        faults: What is wrong.
        warnings: What is odd, but may be meant.
        checked: Counts of what was looked at, by kind.
        digests: Checksum of each atom, where they were computed or known.
    """

    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)
    digests: dict[AtomId, str] = field(default_factory=dict)


def _in_processes(
    workers: int, opened: Opened, call: Callable, items: list, size: Callable[[int], int]
) -> Iterator:
    """Call ``call(items)`` for batches of items, in forked processes when there is much to do."""
    batches: list[list] = [[]]
    total = held = 0
    for item in items:
        batches[-1].append(item)
        held += size(item)
        total += size(item)
        if held > 64 << 20:
            batches.append([])
            held = 0
    global _opened
    _opened = opened
    if workers < 2 or total < 128 << 20:
        yield from map(call, batches)
        return
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        yield from pool.map(call, batches)


_opened: Opened


def verify(opened: Opened, *, workers: int = 2) -> Verdict:
    """Check one checkpoint in itself.

    Args:
        opened: The checkpoint.
        workers: Processes.

    Returns:
        The faults, and checksums of all atoms. Cost: every byte is read twice, in row blocks.
    """
    verdict = Verdict()
    records = opened.tensors.records
    wrong: set[int] = set()
    for faults in _in_processes(
        workers, opened, _check_crcs, list(range(len(records))), lambda i: records[i].nbytes
    ):
        verdict.faults += [fault for _, fault in faults]
        wrong |= {number for number, _ in faults}
    verdict.checked["records by CRC"] = len(records)
    verdict.faults += [Fault(*found) for found in objects.damaged(opened)]
    atoms = list(opened.tensors.atoms)
    held = opened.tensors.atoms
    for faults, digests, counts in _in_processes(
        workers, opened, _check_atoms, atoms, lambda atom: held[atom].nbytes
    ):
        verdict.faults += faults
        verdict.digests.update(digests)
        for kind, count in counts.items():
            verdict.checked[kind] = verdict.checked.get(kind, 0) + count
    verdict.checked["atoms"] = len(atoms)
    verdict.faults += _shifted(opened, verdict, wrong)
    verdict.faults += _twins(opened, verdict.digests)
    verdict.faults += _manifest_faults(opened, verdict.digests)
    verdict.warnings += _untrained(opened, verdict.digests)
    return verdict


def _check_crcs(numbers: list[int]) -> list[tuple[int, Fault]]:
    opened, found = _opened, []
    files = Files(opened.folder, os.O_RDONLY)
    try:
        for number in numbers:
            record = opened.tensors.records[number]
            where = str(opened.folder / record.path)
            base, stored, size = files.data_of(record)
            if size != record.nbytes:
                continue  # a view of a bigger storage; its atoms' checksums cover it
            if crc_of(files.fd(record.path), base, size, where) != stored:
                cause = "its bytes do not match their CRC: they have changed since it was written"
                found.append((number, Fault(record.path, record.label, cause)))
    finally:
        files.close()
    return found


def _check_atoms(
    atoms: list[AtomId],
) -> tuple[list[Fault], dict[AtomId, str], dict[str, int]]:
    opened = _opened
    faults: list[Fault] = []
    digests: dict[AtomId, str] = {}
    counts = {"replicas": 0, "masters": 0}
    with AtomReader(opened) as reader:
        for atom in atoms:
            held = opened.tensors.atoms[atom]
            digests[atom] = reader.digest(held)
            for replica in held.replicas:
                counts["replicas"] += 1
                if not _same_replica(reader, held, replica):
                    record = opened.tensors.records[replica.record]
                    first = opened.tensors.records[held.extents[0].record]
                    cause = f"differs from the copy in {first.path}"
                    faults.append(Fault(record.path, str(atom), cause))
            if atom.role == MASTER:
                counts["masters"] += 1
                faults += _check_master(reader, opened, atom, held)
    return faults, digests, counts


def _same_replica(reader: AtomReader, held: Held, replica: Extent) -> bool:
    box = Held(held.shape, held.dtype)
    for extent in held.extents:
        found = overlap(extent.start, extent.shape, replica.start, replica.shape)
        if found is None:
            continue
        pair = [[_within(one, *found)] for one in (extent, replica)]
        blocks = zip(*(reader.blocks(box, one) for one in pair), strict=True)
        if not all(np.array_equal(a, b) for a, b in blocks):
            return False
    return True


def _within(extent: Extent, start: Shape, shape: Shape) -> Extent:
    """Return a part of an extent."""
    offset = extent.offset + inner_offset(start, extent)
    return extent._replace(start=start, shape=shape, offset=offset)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round fp32 to bfloat16, to nearest even; both as unsigned integers of their bits."""
    rounded: np.ndarray = ((values + 0x7FFF + ((values >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def _check_master(reader: AtomReader, opened: Opened, atom: AtomId, held: Held) -> list[Fault]:
    """The master must round to the weight: free proof that the optimizer state is where it is."""
    weight = opened.tensors.atoms.get(AtomId(atom.name, WEIGHT))
    if weight is None or weight.shape != held.shape:
        return []
    same = 0
    # Blocks of equal rows: the weight's by the master's.
    for mine, other in zip(_rows(reader, held), _rows(reader, weight), strict=True):
        if weight.dtype.name == "bfloat16":
            same += int(np.count_nonzero(to_bfloat16(mine.view(np.uint32)) == other))
        elif weight.dtype.name == "float16":
            half = mine.view(np.float32).astype(np.float16).view(np.uint16)
            same += int(np.count_nonzero(half == other))
        else:
            same += int(np.count_nonzero(mine == other))
    total = prod(held.shape)
    if same >= _MATCH * total:
        return []
    record = opened.tensors.records[held.extents[0].record]
    cause = f"only {same} of {total} masters round to their weight"
    return [Fault(record.path, str(atom), cause)]


def _rows(reader: AtomReader, held: Held) -> Iterator[np.ndarray]:
    """Yield an atom's elements in equal pieces, whatever its element size."""
    pending = np.empty(0, held.dtype.carrier)
    size = 1 << 20
    for block in reader.blocks(held):
        pending = (
            np.concatenate([pending, block.reshape(-1)]) if len(pending) else block.reshape(-1)
        )
        while len(pending) >= size:
            yield pending[:size]
            pending = pending[size:]
    if len(pending):
        yield pending


def _shifted(opened: Opened, verdict: Verdict, damaged: set[int]) -> list[Fault]:
    """Name the known cause when masters are wrong that no damaged record explains."""
    if opened.optimizer is None or opened.optimizer.kind != "fully_reshardable":
        return []
    faults = {f.tensor: f for f in verdict.faults if "round to their weight" in f.cause}
    held = opened.tensors.atoms
    wrong = [
        atom
        for atom in held
        if str(atom) in faults
        and not any(
            extent.record in damaged
            for role in (WEIGHT, MASTER)
            for extent in held[AtomId(atom.name, role)].extents
        )
    ]
    if not wrong:
        return []
    cause = (
        f"masters of {len(wrong)} tensors are not their weights': Megatron up to 0.19.2 writes "
        "fully_reshardable state shifted when a buffer has several buckets with padding (its PR "
        "5077). The moments are shifted too. Resume with --no-load-optim, or from an earlier save; "
        "reshard with --optim drop"
    )
    return [Fault(".metadata", "optimizer state", cause)]


def _untrained(opened: Opened, digests: dict[AtomId, str]) -> list[str]:
    """Experts whose second moments are all zero, while others' are not: they got no gradient."""
    zeros: dict[int, str] = {}
    still: dict[str, set[int]] = defaultdict(set)
    moved: dict[str, set[int]] = defaultdict(set)
    for atom, digest in digests.items():
        before, _, after = atom.name.partition(".mlp.experts.")
        if atom.role != MOMENT2 or not after:
            continue
        nbytes = opened.tensors.atoms[atom].nbytes
        if nbytes not in zeros:
            zeros[nbytes] = _digest_of_zeros(nbytes)
        expert = int(after.partition(".")[0])
        (still if digest == zeros[nbytes] else moved)[before].add(expert)
    return [
        f"{layer}: experts {sorted(lost)} were never trained: their second moments are all zero"
        for layer in still
        if (lost := still[layer] - moved[layer]) and moved
    ]


def _digest_of_zeros(nbytes: int) -> str:
    total, block = xxhash.xxh3_128(), bytes(1 << 20)
    for at in range(0, nbytes, len(block)):
        total.update(memoryview(block)[: nbytes - at])
    digest: str = total.hexdigest()
    return digest


def _twins(opened: Opened, digests: dict[AtomId, str]) -> list[Fault]:
    """Experts that are each other's copies: written twice, or never trained apart."""
    found = []
    seen: dict[tuple[str, str], str] = {}
    for atom, digest in digests.items():
        if atom.role != WEIGHT or ".experts." not in atom.name or "bias" in atom.name:
            continue
        before, _, after = atom.name.partition(".experts.")
        number, _, tail = after.partition(".")
        key = (f"{before}.{tail}", digest)
        if key in seen and seen[key] != number:
            record = opened.tensors.records[opened.tensors.atoms[atom].extents[0].record]
            cause = f"equals expert {seen[key]}: written twice, or both were never trained"
            found.append(Fault(record.path, atom.name, cause))
        seen.setdefault(key, number)
    return found


def _manifest_faults(opened: Opened, digests: dict[AtomId, str]) -> list[Fault]:
    """Atoms that are not what the manifest says was written."""
    return [
        Fault(manifest.NAME, str(atom), "is not what was written: its checksum differs")
        for atom, said in manifest.digests_of(opened).items()
        if atom in digests and digests[atom] != said
    ]


def compare(
    a: Opened, b: Opened, known_a: dict[AtomId, str], known_b: dict[AtomId, str]
) -> list[Fault]:
    """Compare two checkpoints atom by atom, whatever their formats and layouts.

    Args:
        a: One.
        b: Other.
        known_a: Its atoms' checksums, as far as they are known; the rest is read.
        known_b: The other's.

    Returns:
        Differences. An fp32 run's masters are its weights, so one side may have them alone; the
        padding of the vocabulary may differ.
    """
    faults = []
    where = str(b.folder)
    with AtomReader(a) as reader_a, AtomReader(b) as reader_b:
        for atom in sorted({*a.tensors.atoms, *b.tensors.atoms}):
            one, other = a.tensors.atoms.get(atom), b.tensors.atoms.get(atom)
            if one is None or other is None:
                if not _derived(atom, a if one is None else b):
                    side = a if one is None else b
                    faults.append(Fault(str(side.folder), str(atom), "is missing"))
                continue
            if one.dtype != other.dtype:
                cause = f"is {other.dtype.name}, was {one.dtype.name}"
                faults.append(Fault(where, str(atom), cause))
            elif one.shape != other.shape:
                faults += _compare_padded(a, reader_a, reader_b, atom, one, other, where)
            else:
                first = known_a.get(atom) or reader_a.digest(one)
                second = known_b.get(atom) or reader_b.digest(other)
                if first != second:
                    faults.append(
                        Fault(where, str(atom), _first_difference(reader_a, reader_b, one, other))
                    )
    return faults


def _derived(atom: AtomId, without: Opened) -> bool:
    """Whether a checkpoint may lack an atom: masters of an fp32 run are its weights."""
    weight = without.tensors.atoms.get(AtomId(atom.name, WEIGHT))
    is_fp32 = weight is not None and weight.dtype.name == "float32"
    return atom.role == MASTER and is_fp32


def _compare_padded(
    a: Opened,
    reader_a: AtomReader,
    reader_b: AtomReader,
    atom: AtomId,
    one: Held,
    other: Held,
    where: str,
) -> list[Fault]:
    rows = min(one.shape[0], other.shape[0])
    true = getattr(a.args, "vocab_size", None)
    rest = (one.shape[1:], other.shape[1:])
    if rest[0] != rest[1] or not atom.name.startswith(("embedding.", "output_layer.")):
        return [Fault(where, str(atom), f"has shape {list(other.shape)}, had {list(one.shape)}")]
    rows = min(rows, true) if isinstance(true, int) else rows
    width = prod(one.shape[1:])
    left = [block.reshape(-1) for block in reader_a.blocks(one)]
    right = [block.reshape(-1) for block in reader_b.blocks(other)]
    same = np.array_equal(
        np.concatenate(left)[: rows * width], np.concatenate(right)[: rows * width]
    )
    return [] if same else [Fault(where, str(atom), f"differs in its first {rows} rows")]


def _first_difference(reader_a: AtomReader, reader_b: AtomReader, one: Held, other: Held) -> str:
    row = count = 0
    first = None
    for x, y in zip(reader_a.blocks(one), reader_b.blocks(other), strict=False):
        if x.shape != y.shape:
            return "differs"
        places = np.argwhere(x != y)
        count += len(places)
        if first is None and len(places):
            first = [int(places[0][0]) + row, *(int(i) for i in places[0][1:])]
        row += x.shape[0]
    return f"differs in {count} of {prod(one.shape)} elements, first at {first}"
