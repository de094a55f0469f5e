"""Stored arrays as arrangements of atoms: which atom each box of an array belongs to.

The same description serves a rank's local tensor, a global tensor with leading layer and expert
axes, and a parameter inside a flat buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_moe.tools.checkpoint.model.atoms import Part
from megatron_moe.tools.checkpoint.model.boxes import Shape, overlap, row_major

HALVES = (".gate", ".up")


@dataclass(frozen=True, slots=True)
class Array:
    """An array made of atoms.

    Args:
        template: Atom's name, with ``{layer}`` and ``{expert}`` where leading axes count them.
        shape: Of the array, as it is indexed (GroupedMLP: its view ``(e, in, out)``).
        lead: What the leading axes count: ``layer``, ``expert``.
        first: Number of index 0 of each leading axis.
        halves: 2 where the atom's dimension 0 holds gate ‖ linear.
        half: The one half held, where it is one.
        cut: Dimension of the atom of which this array has one slice; None for all of it.
        index: Which slice.
        count: Of how many.
        transposed: The two dimensions behind the leading ones are the atom's, swapped.
    """

    template: str
    shape: Shape
    lead: tuple[str, ...] = ()
    first: Shape = ()
    halves: int = 1
    half: int | None = None
    cut: int | None = None
    index: int = 0
    count: int = 1
    transposed: bool = False

    def atom_shape(self) -> Shape:
        """Return the whole shape of each atom."""
        own = list(self._rest(self.shape))
        if self.halves == 2:
            own[0] //= 2
        if self.cut is not None:
            own[self.cut] *= self.count
        return tuple(own)

    def _rest(self, values: Shape) -> Shape:
        rest = values[len(self.lead) :]
        return rest[::-1] if self.transposed else rest

    def names(self) -> Iterator[str]:
        """Yield the atoms' names."""
        lead = self.shape[: len(self.lead)]
        for index in product(*map(range, lead)):
            base = self._name(index)
            for half in self._halves():
                yield base + half

    def _halves(self) -> tuple[str, ...]:
        if self.half is not None:
            return (HALVES[self.half],)
        return HALVES if self.halves == 2 else ("",)

    def _name(self, index: Shape) -> str:
        if not self.lead:
            return self.template
        numbers = {
            axis: first + i for axis, first, i in zip(self.lead, self.first, index, strict=True)
        }
        name = self.template
        for axis, number in numbers.items():
            name = name.replace("{" + axis + "}", str(number))
        return name

    def parts(
        self, start: Shape, shape: Shape, offset: int = 0, strides: Shape | None = None
    ) -> Iterator[Part]:
        """Yield the parts of atoms in a box of the array.

        Args:
            start: Of the box.
            shape: Of the box.
            offset: Of the box's first element in its storage, in elements.
            strides: In the storage; those of a contiguous box when None.
        """
        strides = row_major(shape) if strides is None else strides
        depth = len(self.lead)
        whole, rest_strides = self.atom_shape(), self._rest(strides)
        rest_start, rest_shape = self._rest(start), self._rest(shape)
        own = list(self._rest(self.shape))
        halves = self._halves()
        if self.halves == 2:
            own[0] //= 2
        for index in product(*(range(n) for n in shape[:depth])):
            base = offset + sum(i * s for i, s in zip(index, strides, strict=False))
            name = self._name(tuple(i + s for i, s in zip(index, start, strict=False)))
            for i, half in enumerate(halves):
                first = (
                    (i * own[0], *(0,) * (len(own) - 1)) if self.halves == 2 else (0,) * len(own)
                )
                found = overlap(rest_start, rest_shape, first, tuple(own))
                if found is None:
                    continue
                at, size = found
                inside = sum(
                    (a - b) * s for a, b, s in zip(at, rest_start, rest_strides, strict=True)
                )
                atom_start = [a - b for a, b in zip(at, first, strict=True)]
                if self.cut is not None:
                    atom_start[self.cut] += self.index * own[self.cut]
                yield Part(name + half, whole, tuple(atom_start), size, base + inside, rest_strides)

    def all_parts(self, offset: int = 0, strides: Shape | None = None) -> Iterator[Part]:
        """Yield the parts of the whole array."""
        return self.parts((0,) * len(self.shape), self.shape, offset, strides)
