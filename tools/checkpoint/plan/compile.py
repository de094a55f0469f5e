"""Join source and target: a job for each atom, every element accounted for."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from typing import Any, NamedTuple

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.model.atoms import MASTER, WEIGHT, AtomId, Extent, Held
from megatron_moe.tools.checkpoint.model.boxes import Shape, fault_of_cover, overlap
from megatron_moe.tools.checkpoint.model.catalogue import EMBEDDING, OUTPUT
from megatron_moe.tools.checkpoint.plan.keep import Keeper
from megatron_moe.tools.checkpoint.plan.output import Drop, Target
from megatron_moe.tools.checkpoint.plan.request import Resolved
from megatron_moe.tools.checkpoint.plan.torch_dist import DistTarget
from megatron_moe.tools.checkpoint.plan.torch_files import TorchTarget
from megatron_moe.tools.checkpoint.read.opened import Opened


class Job(NamedTuple):
    """One atom to be moved.

    Args:
        atom: In the target.
        shape: In the target.
        held_shape: In the source; smaller where a vocabulary grows.
        itemsize: Bytes of an element.
        sources: Extents in the source's records.
        targets: Extents in the target's records.
    """

    atom: AtomId
    shape: Shape
    held_shape: Shape
    itemsize: int
    sources: tuple[Extent, ...]
    targets: tuple[Extent, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the atom."""
        return prod(self.shape) * self.itemsize


@dataclass
class Plan:
    """Everything that will happen, as data.

    Args:
        source: Checkpoint read.
        to: What is made of it.
        target: Files and records.
        jobs: Atoms to be moved, in the order of the source's files.
        dropped: What of the source is left out, with the reason.
        invented: Elements that are not in the source: rows of a longer vocabulary, zeros.
    """

    source: Opened
    to: Resolved
    target: Target
    jobs: list[Job]
    dropped: list[Drop]
    invented: dict[str, int]

    @property
    def write_bytes(self) -> int:
        """Bytes of new files."""
        return sum(file.size for file in self.target.files if file.link is None)

    @property
    def linked_bytes(self) -> int:
        """Bytes of files taken over whole."""
        return sum(file.size for file in self.target.files if file.link is not None)

    @property
    def read_bytes(self) -> int:
        """Bytes of tensors that are read."""
        return sum(prod(e.shape) * job.itemsize for job in self.jobs for e in job.sources)

    def describe(self) -> dict[str, Any]:
        """Return the plan as data for JSON: files, every copy, what is dropped or invented."""
        records, outs = self.source.tensors.records, self.target.records
        return {
            "source": str(self.source.folder),
            "from": {"format": self.source.location.form, "layout": str(self.source.layout)},
            "to": {
                "format": self.to.form,
                "dialect": self.to.dialect,
                "layout": str(self.to.layout),
                "optimizer": self.to.optimizer,
            },
            "bytes": {
                "read": self.read_bytes,
                "written": self.write_bytes,
                "linked": self.linked_bytes,
            },
            "files": [
                {"path": f.path, "bytes": f.size, "linked_from": f.link} for f in self.target.files
            ],
            "atoms": [
                {
                    "atom": str(job.atom),
                    "shape": list(job.shape),
                    "from": [
                        [records[e.record].path, records[e.record].label, e.start, e.shape]
                        for e in job.sources
                    ],
                    "to": [
                        [
                            self.target.files[outs[e.record].file].path,
                            outs[e.record].label,
                            e.start,
                            e.shape,
                        ]
                        for e in job.targets
                    ],
                }
                for job in self.jobs
            ],
            "dropped": [vars(drop) for drop in self.dropped],
            "invented": self.invented,
            "notes": self.target.notes + self.source.notes,
        }

    def identity(self) -> str:
        """Return a digest of the plan and of the source's files: what a journal belongs to."""
        stat = {
            name: [size, (self.source.folder / name).stat().st_mtime_ns]
            for name, size in self.source.files.items()
        }
        text = json.dumps([self.describe(), stat], sort_keys=True, default=str)
        return blake2b(text.encode(), digest_size=16).hexdigest()


def compile_plan(source: Opened, to: Resolved) -> Plan:
    """Lay out the target and join it with the source.

    Returns:
        The plan. Cost: none but memory and time for the plan itself; no tensor is read.

    Raises:
        CheckpointError: Some target element has no source, or a source element is left without a
            reason.
    """
    if to.form == "torch":
        target = TorchTarget(source, to).build()
    else:
        target = DistTarget(source, to, Keeper(source, to)).build()
    dropped, invented = list(target.dropped), {}
    jobs = []
    for atom, extents in target.atoms.items():
        job = _job(source, target, atom, extents, to)
        jobs.append(job)
        if job.shape != job.held_shape and prod(job.shape) > prod(job.held_shape):
            invented[str(atom)] = prod(job.shape) - prod(job.held_shape)
    if any(job.shape != job.held_shape for job in jobs):
        target.notes.append(
            "the padded vocabulary changes, and Megatron's softmax runs over the padding too: "
            "losses will differ a little. A --make-vocab-size-divisible-by that gives "
            "the old padding at the new TP avoids it"
        )
    _check_records(target)
    _check_covers(target)
    dropped += _unused(source, target, to)
    jobs.sort(key=lambda job: _place(source, job))
    return Plan(source, to, target, jobs, dropped, invented)


def _place(source: Opened, job: Job) -> tuple[str, int, int]:
    first = job.sources[0]
    record = source.tensors.records[first.record]
    return record.path, record.archive[0] if record.archive else first.record, first.offset


def _job(source: Opened, target: Target, atom: AtomId, extents: list[Extent], to: Resolved) -> Job:
    held = source.tensors.atoms.get(atom)
    if held is None and atom.role == MASTER:
        # fp32 weights are their own masters.
        weights = source.tensors.atoms.get(AtomId(atom.name, WEIGHT))
        held = weights if weights is not None and weights.dtype.name == "float32" else None
    if held is None:
        raise CheckpointError(
            f"the target needs {atom}, which the source has not. Pass --optim drop to reshard the "
            "weights alone"
        )
    _check_dtype(target, atom, held, extents)
    shape = target.shapes[atom]
    if shape != held.shape:
        _check_vocabulary(source, atom, shape, held.shape)
    return Job(atom, shape, held.shape, held.dtype.itemsize, tuple(held.extents), tuple(extents))


def _check_dtype(target: Target, atom: AtomId, held: Held, extents: list[Extent]) -> None:
    for extent in extents:
        record = target.records[extent.record]
        if record.dtype != held.dtype:
            raise CheckpointError(
                f"{atom} is {held.dtype.name} in the source and {record.dtype.name} in the target: "
                "optimizer states other than fp32 (a precision-aware optimizer) are not converted. "
                "Pass --optim drop to reshard the weights"
            )


def _check_vocabulary(source: Opened, atom: AtomId, shape: Shape, held: Shape) -> None:
    if not atom.name.startswith((EMBEDDING, OUTPUT.partition(".")[0])):
        raise AssertionError(f"{atom}: {held} in the source, {shape} in the target")
    true = getattr(source.args, "vocab_size", None)
    if shape[0] < held[0] and (not isinstance(true, int) or shape[0] < true):
        raise CheckpointError(
            f"{atom}: the target's padded vocabulary of {shape[0]} would cut the true one of "
            f"{true if isinstance(true, int) else f'unknown size (stored: {held[0]})'}; choose "
            "another --make-vocab-size-divisible-by"
        )


def _check_records(target: Target) -> None:
    """Every element of every new record is written exactly once."""
    written: dict[int, int] = defaultdict(int)
    for extents in target.atoms.values():
        for extent in extents:
            written[extent.record] += prod(extent.shape)
    for number, record in enumerate(target.records):
        if written[number] + record.gaps != record.numel:
            raise CheckpointError(
                f"{target.files[record.file].path}: {record.label}: {written[number]} of "
                f"{record.numel} elements would be written ({record.gaps} are gaps): the plan is "
                "wrong, nothing was written. Please report it"
            )


def _check_covers(target: Target) -> None:
    """Every atom of the target is there whole, once or several times (replicas)."""
    for atom in {**target.atoms, **target.kept_atoms}:
        boxes = [
            (e.start, e.shape)
            for e in (*target.atoms.get(atom, ()), *target.kept_atoms.get(atom, ()))
        ]
        fault = fault_of_cover(_first_copy(boxes, target.shapes[atom]), target.shapes[atom])
        if fault:
            raise CheckpointError(f"{atom}: {fault}: the plan is wrong, nothing was written")


def _first_copy(boxes: list[tuple[Shape, Shape]], shape: Shape) -> list[tuple[Shape, Shape]]:
    """Return boxes without those that only repeat: replicas, perhaps cut at other elements."""
    once = list(dict.fromkeys(boxes))
    if sum(prod(size) for _, size in once) <= prod(shape):
        return once
    chosen: list[tuple[Shape, Shape]] = []
    for box in once:
        if not any(overlap(*box, *other) for other in chosen):
            chosen.append(box)
    return chosen


def _unused(source: Opened, target: Target, to: Resolved) -> list[Drop]:
    """Atoms of the source that go nowhere, with the reason; an error without one."""
    used = set(target.atoms) | set(target.kept_atoms)
    count: dict[str, int] = defaultdict(int)
    drops = []
    for atom, held in source.tensors.atoms.items():
        if atom in used:
            shape = target.shapes[atom]
            if prod(shape) < prod(held.shape):
                rows = held.shape[0] - shape[0]
                drops.append(
                    Drop(f"{rows} rows of {atom}", "padding of the vocabulary, beyond its true "
                         "size", prod(held.shape) - prod(shape))
                )  # fmt: skip
            continue
        if atom.role == WEIGHT:
            raise CheckpointError(
                f"{atom} of the source would go nowhere: the plan is wrong, nothing was written"
            )
        count[atom.role] += prod(held.shape)
    for role, elements in sorted(count.items()):
        reason = (
            "--optim drop"
            if to.optimizer is None
            else ("an fp32 run without the distributed optimizer has no masters beside its weights")
        )
        drops.append(Drop(f"optimizer state {role}", reason, elements))
    return drops
