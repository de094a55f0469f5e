"""Axis-parallel boxes of index space, and flat ranges cut into them."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

Shape = tuple[int, ...]


def row_major(shape: Shape) -> Shape:
    """Return the strides of a contiguous array, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def overlap(a: Shape, a_shape: Shape, b: Shape, b_shape: Shape) -> tuple[Shape, Shape] | None:
    """Return start and shape of the intersection of two boxes; None when they are disjoint."""
    start, shape = [], []
    for i in range(len(a)):
        first = a[i] if a[i] > b[i] else b[i]
        a_end, b_end = a[i] + a_shape[i], b[i] + b_shape[i]
        size = (a_end if a_end < b_end else b_end) - first
        if size <= 0:
            return None
        start.append(first)
        shape.append(size)
    return tuple(start), tuple(shape)


def boxes_of_range(shape: Shape, begin: int, end: int) -> Iterator[tuple[Shape, Shape, int]]:
    """Cut the flat range ``[begin, end)`` of a row-major array into boxes.

    Yields:
        Start, shape, and flat index of the box's first element; in order. At most 2·dims - 1.
    """
    if begin >= end:
        return
    if len(shape) <= 1:
        yield ((begin,), (end - begin,), begin) if shape else ((), (), 0)
        return
    row = prod(shape[1:])
    first, last = begin // row, (end - 1) // row
    at = begin
    if begin % row or end - begin < row:  # a part of one row
        stop = min(end, (first + 1) * row)
        for start, size, flat in boxes_of_range(shape[1:], begin - first * row, stop - first * row):
            yield (first, *start), (1, *size), flat + first * row
        at, first = stop, first + 1
    whole = (end - at) // row
    if at < end and whole:
        yield (first, *(0,) * (len(shape) - 1)), (whole, *shape[1:]), at
        at += whole * row
    if at < end:
        for start, size, flat in boxes_of_range(shape[1:], 0, end - at):
            yield (last, *start), (1, *size), flat + last * row


def fault_of_cover(boxes: list[tuple[Shape, Shape]], shape: Shape) -> str | None:
    """Say why boxes do not cover an array exactly once; None when they do.

    Cost: O(n²) boxes in the worst case, O(n log n) when they differ along one axis.
    """
    covered = 0
    ordered = sorted(boxes)
    for i, (start, size) in enumerate(ordered):
        inside = len(start) == len(size) == len(shape) and all(
            s >= 0 and s + n <= whole for s, n, whole in zip(start, size, shape, strict=True)
        )
        if not inside:
            return f"the part at {start} of shape {size} lies outside {shape}"
        covered += prod(size)
        for other, other_size in ordered[i + 1 :]:
            if start and other[0] >= start[0] + size[0]:
                break
            if overlap(start, size, other, other_size):
                return f"the parts at {start} {size} and {other} {other_size} overlap"
    missing = prod(shape) - covered
    return f"{missing} of {prod(shape)} elements are in no part" if missing else None
