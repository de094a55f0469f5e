"""Atoms: the tensors a checkpoint is made of once every parallel cut is undone.

One atom is one parameter of one layer and one expert, with gate and linear halves of a gated layer
apart, in one role. Its name and its bytes are the same in every format and layout; formats differ
in where the parts of an atom lie. A part is an affine map from a box of the atom to a record.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple

from megatron_moe.tools.checkpoint.model.boxes import Shape
from megatron_moe.tools.checkpoint.stored.dtypes import DType

WEIGHT, MASTER, MOMENT1, MOMENT2 = "weight", "master", "exp_avg", "exp_avg_sq"
STATES = (MASTER, MOMENT1, MOMENT2)


class AtomId(NamedTuple):
    """Name (``decoder.layers.3.mlp.experts.17.linear_fc1.weight.gate``) and role."""

    name: str
    role: str = WEIGHT

    def __str__(self) -> str:
        return self.name if self.role == WEIGHT else f"{self.name} [{self.role}]"


class Part(NamedTuple):
    """A box of an atom inside some array: the local tensor of a rank, a chunk, a flat buffer.

    Args:
        name: The atom's.
        whole: The atom's shape.
        start: Of the box, in the atom.
        shape: Of the box.
        offset: Of the box's first element in the array's storage, in elements.
        strides: In the array's storage, in elements, by the atom's dimensions.
    """

    name: str
    whole: Shape
    start: Shape
    shape: Shape
    offset: int
    strides: Shape


class Extent(NamedTuple):
    """A box of an atom in a record; as :class:`Part`, placed."""

    record: int
    start: Shape
    shape: Shape
    offset: int
    strides: Shape


@dataclass(frozen=True, slots=True)
class Record:
    """Tensor bytes on disk.

    Args:
        path: File, relative to the checkpoint.
        archive: ``(start, length)`` of the archive in its file; its record is ``data/<key>``.
        key: Of the record in its archive.
        dtype: Of the elements.
        numel: Elements.
        label: What it holds, for messages.
        shape: Of the tensor that was pickled with it, where it is a chunk.
    """

    path: str
    archive: tuple[int, int] | None
    key: str
    dtype: DType
    numel: int
    label: str
    shape: Shape | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(slots=True)
class Held:
    """Where one atom lies.

    Args:
        shape: Of the whole atom.
        dtype: Element type.
        extents: Parts, which together cover it once.
        replicas: Parts stored again; they must equal ``extents``.
    """

    shape: Shape
    dtype: DType
    extents: list[Extent] = field(default_factory=list)
    replicas: list[Extent] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass
class Tensors:
    """All atoms of a checkpoint with the records that hold them."""

    root: Path
    records: list[Record] = field(default_factory=list)
    atoms: dict[AtomId, Held] = field(default_factory=dict)
