"""Laws of the model of checkpoints: every element once, whatever the layout."""

from itertools import pairwise, product
from math import prod

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_moe.tools.checkpoint.model.arrays import Array
from megatron_moe.tools.checkpoint.model.boxes import (
    boxes_of_range,
    fault_of_cover,
    overlap,
    row_major,
)
from megatron_moe.tools.checkpoint.model.buffers import Parameter, cut, cut_by_lengths
from megatron_moe.tools.checkpoint.model.layout import Layout, Pipeline, Places

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_boxes_of_a_range_cover_it_exactly(shape, data):
    size = prod(shape)
    begin = data.draw(st.integers(0, size))
    end = data.draw(st.integers(begin, size))
    index = np.arange(size).reshape(shape)
    found, boxes = [], list(boxes_of_range(shape, begin, end))
    for start, box, flat in boxes:
        inside = index[tuple(slice(s, s + n) for s, n in zip(start, box, strict=True))]
        assert flat == begin + len(found)
        found += inside.reshape(-1).tolist()
    assert found == list(range(begin, end))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


BOX = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=3)


@given(st.data())
def test_overlap_is_symmetric_and_right(data):
    a = data.draw(BOX)
    b = data.draw(
        st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=len(a), max_size=len(a))
    )

    def split(box):
        return tuple(s for s, _ in box), tuple(n for _, n in box)

    def cells(box):
        return set(product(*(range(s, s + n) for s, n in box)))

    found = overlap(*split(a), *split(b))
    assert found == overlap(*split(b), *split(a))
    shared = cells(a) & cells(b)
    assert (cells(list(zip(*found, strict=True))) if found else set()) == shared


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), st.data())
def test_faults_of_a_cover_are_those_of_counting(shape, data):
    boxes = data.draw(
        st.lists(
            st.tuples(*(st.tuples(st.integers(0, n - 1), st.integers(1, n)) for n in shape)),
            max_size=5,
        )
    )
    count = np.zeros(shape, int)
    outside = False
    for box in boxes:
        outside |= any(s + n > whole for (s, n), whole in zip(box, shape, strict=True))
        count[tuple(slice(s, s + n) for s, n in box)] += 1
    split = [(tuple(s for s, _ in box), tuple(n for _, n in box)) for box in boxes]
    assert (fault_of_cover(split, shape) is None) == (not outside and bool((count == 1).all()))


@st.composite
def arrays(draw):
    """All slices of an array with leading axes, halves, a cut, and maybe transposed."""
    lead = draw(st.sampled_from([(), ("layer",), ("expert",), ("layer", "expert")]))
    transposed = draw(st.booleans())
    own = draw(st.lists(st.integers(1, 3), min_size=2 if transposed else 1, max_size=2))
    halves = draw(st.sampled_from([1, 2]))
    half = draw(st.sampled_from([None, 0, 1])) if halves == 1 else None
    cut_at = draw(st.sampled_from([None, *range(len(own))]))
    count = draw(st.integers(1, 3)) if cut_at is not None else 1
    counts = tuple(draw(st.integers(1, 3)) for _ in lead)
    first = tuple(draw(st.integers(0, 4)) for _ in lead)
    shape = [own[0] * halves, *own[1:]]
    template = ".".join(["w", *("{" + axis + "}" for axis in lead)])
    return [
        Array(
            template, (*counts, *(shape[::-1] if transposed else shape)), lead, first, halves, half,
            cut_at, index, count, transposed,
        )
        for index in range(count)
    ]  # fmt: skip


def numbers(slices: list[Array]) -> dict[str, np.ndarray]:
    """Whole atoms with an own number in each element."""
    out, at = {}, 0
    for name in slices[0].names():
        shape = slices[0].atom_shape()
        out[name] = np.arange(at, at + prod(shape)).reshape(shape)
        at += prod(shape)
    return out


def stored(array: Array, atoms: dict[str, np.ndarray]) -> np.ndarray:
    """Build a slice of the array from atoms, with numpy alone."""
    depth = len(array.lead)
    out = np.empty(array.shape, int)
    for index in np.ndindex(array.shape[:depth]):
        base = array.template
        for axis, first, i in zip(array.lead, array.first, index, strict=True):
            base = base.replace("{" + axis + "}", str(first + i))
        halves = (
            [".gate", ".up"]
            if array.halves == 2
            else [["", ".gate", ".up"][(array.half if array.half is not None else -1) + 1]]
        )
        pieces = []
        for half in halves:
            atom = atoms[base + half]
            if array.cut is not None:
                atom = np.split(atom, array.count, array.cut)[array.index]
            pieces.append(atom)
        whole = np.concatenate(pieces)
        out[index] = whole.T if array.transposed else whole
    return out


def apply(parts, storage: np.ndarray, filled: dict[str, np.ndarray], taken: dict[str, np.ndarray]):
    for part in parts:
        assert filled[part.name].shape == part.whole
        box = tuple(slice(s, s + n) for s, n in zip(part.start, part.shape, strict=True))
        for cell in np.ndindex(part.shape):
            at = part.offset + sum(i * s for i, s in zip(cell, part.strides, strict=True))
            filled[part.name][tuple(s + i for s, i in zip(part.start, cell, strict=True))] = (
                storage[at]
            )
        taken[part.name][box] += 1


@settings(max_examples=150)
@given(arrays(), st.integers(0, 5))
def test_parts_of_all_slices_are_every_atom_once(slices, pad):
    atoms = numbers(slices)
    filled = {name: np.full(atom.shape, -1) for name, atom in atoms.items()}
    taken = {name: np.zeros(atom.shape, int) for name, atom in atoms.items()}
    for array in slices:
        assert list(array.names()) == list(slices[0].names())
        storage = np.concatenate([np.full(pad, -2), stored(array, atoms).reshape(-1)])
        apply(array.all_parts(pad), storage, filled, taken)
    for name, atom in atoms.items():
        assert (filled[name] == atom).all()
        assert (taken[name] == 1).all()


@settings(max_examples=150)
@given(arrays(), st.data())
def test_parts_of_chunks_are_every_atom_once(slices, data):
    """Cut each slice into chunks anywhere, as ``torch_dist`` may, stored with any strides."""
    atoms = numbers(slices)
    filled = {name: np.full(atom.shape, -1) for name, atom in atoms.items()}
    taken = {name: np.zeros(atom.shape, int) for name, atom in atoms.items()}
    for array in slices:
        content = stored(array, atoms)
        edges = [
            sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=2))}) for n in array.shape
        ]
        for ends in product(*(list(pairwise(e)) for e in edges)):
            start = tuple(a for a, _ in ends)
            shape = tuple(b - a for a, b in ends)
            chunk = content[tuple(slice(a, b) for a, b in ends)]
            if data.draw(st.booleans()):
                apply(array.parts(start, shape), chunk.reshape(-1), filled, taken)
                continue
            reverse = chunk.transpose().reshape(-1)  # column-major memory
            strides = row_major(shape[::-1])[::-1]
            apply(array.parts(start, shape, 0, strides), reverse, filled, taken)
    for name, atom in atoms.items():
        assert (filled[name] == atom).all()
        assert (taken[name] == 1).all()


def flat_cells(stages, layout):
    return [stages[i % layout.pp][i // layout.pp] for i in range(layout.pp * layout.vpp)]


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 3), st.integers(1, 3),
    st.booleans(), st.booleans(), st.sampled_from([None, "first", "last", "both", "counted"]),
)  # fmt: skip
def test_stages_hold_every_layer_once_and_in_order(pp, vpp, mtp, some, ends, embedding, loss, how):
    assume(pp > 1 or (vpp == 1 and how is None))
    assume(how != "both" or pp > 1)
    layout = Layout(pp=pp, vpp=vpp)
    options: dict = {}
    total = some * vpp * pp
    if how == "counted":
        options = {"count_embedding": embedding, "count_loss": loss}
        total -= embedding + loss
    elif how:
        fixed = ["first", "last"] if how == "both" else [how]
        options = dict.fromkeys(fixed, ends * vpp)
        total = ends * vpp * len(fixed) + some * vpp * (pp - len(fixed))
    assume(total > 0)
    stages = Pipeline(num_layers=total, mtp_layers=mtp, **options).stages(layout)
    assert [len(rank) for rank in stages] == [vpp] * pp
    cells = flat_cells(stages, layout)
    assert [n for cell in cells for n in cell.layers] == list(range(total))
    assert [n for cell in cells for n in cell.mtp] == list(range(mtp))
    assert [cell.embedding for cell in cells] == [True] + [False] * (len(cells) - 1)
    assert [cell.output for cell in cells] == [False] * (len(cells) - 1) + [True]
    for name, place in (("first", 0), ("last", -1)):
        if options.get(name) is not None:
            assert sum(len(cell.layers) for cell in stages[place]) == options[name]


@given(st.integers(1, 3), st.integers(1, 3), st.data())
def test_custom_layouts_hold_every_layer_once_and_in_order(pp, vpp, data):
    assume(pp > 1 or vpp == 1)
    counts = data.draw(st.lists(st.integers(0, 4), min_size=pp * vpp, max_size=pp * vpp))
    assume(sum(counts))
    texts = []
    for count in counts:
        cut_at = data.draw(st.integers(0, count))
        texts.append(
            data.draw(st.sampled_from(["t" * count, f"t*{cut_at}" + "t" * (count - cut_at)]))
            if count
            else ""
        )
    text = "E" + "|".join(texts) + "L"
    layout = Layout(pp=pp, vpp=vpp)
    cells = flat_cells(Pipeline(num_layers=sum(counts), text=text).stages(layout), layout)
    assert [len(cell.layers) for cell in cells] == counts
    assert [n for cell in cells for n in cell.layers] == list(range(sum(counts)))
    assert cells[0].embedding and cells[-1].output


@given(
    st.sampled_from([1, 2, 4]), st.integers(1, 2), st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]), st.integers(1, 3),
)  # fmt: skip
def test_files_hold_every_shard(tp, pp, ep, etp, times):
    """Every dense and every expert shard is in some file, where ETP is no larger than TP."""
    assume(etp <= tp)
    layout = Layout(tp=tp, pp=pp, ep=ep, etp=etp)
    layout = Layout(tp=tp, pp=pp, ep=ep, etp=etp, dp=layout.smallest_dp() * times)
    files = Places(layout).files
    names = [(c.tp, c.pp, c.ep) for c in files]
    assert len(set(names)) == len(names)
    assert {(c.tp, c.pp) for c in files} == set(product(range(tp), range(pp)))
    assert {(c.ep, c.etp, c.pp) for c in files} == set(product(range(ep), range(etp), range(pp)))
    assert all(c.etp == c.tp % etp for c in files)


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=12),
    st.sampled_from([None, 1, 64, 200, 500]),
    st.data(),
)
def test_flat_buffers(sizes, bucket_size, data):
    """Both ways of laying out agree; starts are aligned; nothing overlaps; nothing is lost."""
    shared = data.draw(st.sampled_from([None, *range(len(sizes))]))
    mine = [
        Parameter(f"p{i}", Array(f"p{i}", (n,)), False, True, i == shared)
        for i, n in enumerate(sizes)
    ]
    buckets = cut(mine, bucket_size)
    assert cut_by_lengths(mine, [bucket.numel for bucket in buckets]) == buckets
    walked = [p for bucket in buckets for p, _ in bucket.starts]
    assert walked == mine[::-1]
    for bucket in buckets:
        end = 0
        for parameter, start in bucket.starts:
            assert start % 64 == 0
            assert 0 <= start - end < 64
            end = start + parameter.numel
        assert end <= bucket.numel < end + 64
        assert (
            bucket_size is None
            or len(bucket.starts) == 1
            or bucket.starts[-1][1] < bucket_size + 64
        )
        if any(p.shared for p, _ in bucket.starts):
            assert len(bucket.starts) == 1
    if bucket_size is None and shared is None:
        assert len(buckets) == 1
