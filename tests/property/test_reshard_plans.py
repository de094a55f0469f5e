"""Plans over random models and layouts: every element is used once or dropped with a reason.

Elements are numbered. A plan is carried out on numbers alone, in arrays of our own; the output's
files are written without tensors and read again, so the reader says where each atom now lies, and
there its own numbers must be. A chain of plans returns to where it began.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from helpers.synthetic import hollow, planned, seed
from helpers.synthetic_cases import journeys
from hypothesis import HealthCheck, given, settings

from megatron_moe.tools.checkpoint.model.atoms import MASTER, WEIGHT, AtomId, Extent
from megatron_moe.tools.checkpoint.plan.compile import Plan
from megatron_moe.tools.checkpoint.read.opened import Opened

NOTHING, ZERO = -1, -2  # in a record: not written; in an atom: not in the source
Place = tuple[str, int, str]


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda fd: None)


@dataclass
class Numbers:
    """A checkpoint of numbers.

    Args:
        records: What lies in each record, by file, start of its archive, and key.
        atoms: What each atom must hold.
    """

    records: dict[Place, np.ndarray] = field(default_factory=dict)
    atoms: dict[AtomId, np.ndarray] = field(default_factory=dict)

    def of(self, opened: Opened, extent: Extent) -> np.ndarray:
        record = opened.tensors.records[extent.record]
        start = record.archive[0] if record.archive else 0
        return view(self.records[record.path, start, f"data/{record.key}"], extent)


def view(record: np.ndarray, extent: Extent) -> np.ndarray:
    """Return an extent's elements; the last of them must lie in the record."""
    last = extent.offset + sum(
        (n - 1) * s for n, s in zip(extent.shape, extent.strides, strict=True)
    )
    assert 0 <= extent.offset <= last < record.size
    strides = [s * record.itemsize for s in extent.strides]
    return np.lib.stride_tricks.as_strided(record[extent.offset :], extent.shape, strides)


def box(extent: Extent) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(extent.start, extent.shape, strict=True))


def number(opened: Opened) -> Numbers:
    """Give every element of a seed a number of its own."""
    out, count = Numbers(), 0
    for key, record in enumerate(opened.tensors.records):
        out.records[record.path, 0, f"data/{key}"] = np.full(record.numel, NOTHING)
    for atom, held in opened.tensors.atoms.items():
        mine = np.arange(count, count + prod(held.shape)).reshape(held.shape)
        count += mine.size
        out.atoms[atom] = mine
        for extent in held.extents:
            out.of(opened, extent)[...] = mine[box(extent)]
    return out


def carry_out(plan: Plan, old: Numbers) -> Numbers:
    """Do what a plan says, with numbers; every element is written once."""
    new = Numbers(atoms=dict(old.atoms))
    for atom, shape in plan.target.shapes.items():
        if atom in new.atoms and shape:  # chunks taken over may be those of fewer rows
            new.atoms[atom] = old.atoms[atom][: shape[0]]
    written = [np.full(record.numel, NOTHING) for record in plan.target.records]
    for job in plan.jobs:
        buffer = np.full(job.shape, ZERO)
        for extent in job.sources:
            # A vocabulary that shrinks leaves rows behind.
            inside = tuple(
                slice(min(s.start, n), min(s.stop, n))
                for s, n in zip(box(extent), job.shape, strict=True)
            )
            wanted = tuple(slice(0, s.stop - s.start) for s in inside)
            assert (buffer[inside] == ZERO).all()
            buffer[inside] = old.of(plan.source, extent)[wanted]
        new.atoms[job.atom] = buffer
        for extent in job.targets:
            place = view(written[extent.record], extent)
            assert (place == NOTHING).all()
            place[...] = buffer[box(extent)]
    for record, content in zip(plan.target.records, written, strict=True):
        assert np.count_nonzero(content == NOTHING) == record.gaps
        file = plan.target.files[record.file]
        start = file.archives[record.archive].start
        new.records[file.path, start, record.member] = content
    for file in plan.target.files:
        for path, start, to in (
            [(file.link, None, 0)]
            if file.link
            else [(kept.path, kept.source_offset, kept.offset) for kept in file.kept]
        ):
            for (other, at, key), content in old.records.items():
                if other == path and start in (None, at):
                    new.records[file.path, at if start is None else to, key] = content
    return new


def check_atoms(opened: Opened, numbers: Numbers) -> None:
    """Every atom that the reader finds holds its own numbers, in every copy."""
    for atom, held in opened.tensors.atoms.items():
        mine = np.full(held.shape, NOTHING)
        for extent in held.extents:
            assert (mine[box(extent)] == NOTHING).all()
            mine[box(extent)] = numbers.of(opened, extent)
        for extent in held.replicas:
            assert np.array_equal(mine[box(extent)], numbers.of(opened, extent))
        assert np.array_equal(mine, numbers.atoms[atom]), atom


def check_accounts(plan: Plan, opened: Opened, old: Numbers, new: Numbers) -> None:
    """What of the source is not in the target is listed, with a reason."""
    lost = 0
    for atom, held in plan.source.tensors.atoms.items():
        rows = held.shape[0]
        if atom in opened.tensors.atoms:
            rows -= min(opened.tensors.atoms[atom].shape[0], rows)
            kept = new.atoms[atom][: held.shape[0]]
            assert np.array_equal(kept, old.atoms[atom][: len(kept)])
        lost += rows * prod(held.shape[1:])
    assert lost == sum(drop.elements for drop in plan.dropped)
    assert all(drop.reason for drop in plan.dropped)
    added = {
        str(atom): prod(held.shape) - prod(plan.source.tensors.atoms[atom].shape)
        for atom, held in opened.tensors.atoms.items()
        if atom in plan.source.tensors.atoms
        and held.shape[:1] > plan.source.tensors.atoms[atom].shape[:1]
    }
    assert added.items() <= plan.invented.items()
    weights = {a for a in plan.source.tensors.atoms if a.role == WEIGHT}
    assert {a for a in opened.tensors.atoms if a.role == WEIGHT} == weights


def check_described(plan: Plan) -> None:
    described = plan.describe()
    again = json.loads(json.dumps(described))
    assert len(again["atoms"]) == len(plan.jobs)
    assert again["bytes"]["written"] == sum(
        f["bytes"] for f in again["files"] if f["linked_from"] is None
    )
    for atom in again["atoms"]:
        assert atom["from"] and atom["to"]


def leg(
    source: Opened, numbers: Numbers, wishes: dict[str, Any], out: Path
) -> tuple[Opened, Numbers]:
    plan = planned(source, **wishes)
    check_described(plan)
    moved = carry_out(plan, numbers)
    opened = hollow(plan, out)
    check_atoms(opened, moved)
    check_accounts(plan, opened, numbers, moved)
    states = {atom.role for atom in opened.tensors.atoms} - {WEIGHT}
    full = source.optimizer is not None
    assert states - {MASTER} == ({"exp_avg", "exp_avg_sq"} if full else set())
    return opened, moved


def chain(journey: Any, counted: Counter) -> None:
    """Seed → A → B → C → A: four plans."""
    arch, targets, optimizer = journey
    with TemporaryDirectory() as folder:
        source = seed(arch, Path(folder) / "seed", optimizer=optimizer)
        opened, numbers = source, number(source)
        first = None
        for i, wishes in enumerate([*targets, targets[0]]):
            opened, numbers = leg(opened, numbers, wishes, Path(folder) / str(i))
            first = first or opened
            counted["plans"] += 1
        assert {
            path: size for path, size in opened.files.items() if path.endswith(".pt")
        }.keys() == {path for path in first.files if path.endswith(".pt")}
        same = {a: h.shape for a, h in first.tensors.atoms.items()}
        assert {a: h.shape for a, h in opened.tensors.atoms.items()} == same


def run(examples: int, layers: int) -> int:
    counted: Counter = Counter()

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), database=None)
    @given(journeys(layers=layers))
    def every(journey: Any) -> None:
        chain(journey, counted)

    every()
    return counted["plans"]


def test_plans_move_every_element_once() -> None:
    assert run(75, layers=2) >= 300


@pytest.mark.slow
@pytest.mark.parametrize("part", range(25), ids=lambda i: f"{400 * (i + 1)}_plans")
def test_ten_thousand_plans_move_every_element_once(part: int) -> None:
    assert run(100, layers=4) >= 400
