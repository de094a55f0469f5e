"""Laws of the bytes on disk: joined CRCs, and no input that breaks the readers otherwise."""

import os
import pickle
import tempfile
import zlib
from pathlib import Path

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.stored import archive, crc, pickles


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_combine(a, b):
    assert crc.combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.binary(max_size=50)), max_size=6),
    st.integers(0, 20),
    st.randoms(),
)
def test_joined(pieces, tail, random):
    """Gaps of zeros and pieces, in any order."""
    whole, parts = b"", []
    for gap, data in pieces:
        whole += bytes(gap)
        parts.append((len(whole), len(data), zlib.crc32(data)))
        whole += data
    whole += bytes(tail)
    gaps = tail + sum(gap for gap, _ in pieces)
    random.shuffle(parts)
    assert crc.joined(parts, len(whole), gaps_are_zero=True) == zlib.crc32(whole)
    expected = None if gaps else zlib.crc32(whole)
    assert crc.joined(parts, len(whole), gaps_are_zero=False) == expected


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4)
        | st.tuples(inner, inner)
    ),
    max_leaves=12,
)


@given(PLAIN)
def test_what_is_written_python_reads_alike(thing):
    assert pickle.loads(pickles.dump(thing)) == thing


@given(PLAIN, st.integers(3, 5))
def test_what_python_writes_is_read_alike(thing, protocol):
    assert pickles.load(pickle.dumps(thing, protocol), "x") == thing


def only_our_error(call, *args):
    try:
        call(*args)
    except CheckpointError as fault:
        assert str(fault).startswith("f.pt")


# PUT and LONG_BINPUT with a great number make Python take that much memory: not tried here.
HARMLESS = st.binary(max_size=200).filter(lambda data: not {*b"pr"} & {*data})


@given(HARMLESS)
def test_random_bytes_are_no_pickle_or_a_harmless_one(data):
    only_our_error(pickles.load, data, "f.pt")


@given(HARMLESS)
def test_random_bytes_behind_a_good_beginning(data):
    only_our_error(pickles.load, b"\x80\x02}q\x00(X\x01\x00\x00\x00a" + data + b"u.", "f.pt")


@given(st.text("abcopsy._", max_size=12), st.text("abcdEPSv_.", max_size=12))
@example("os", "system")
def test_functions_never_pass(module, name):
    data = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"K\x01\x85R."
    try:
        found = pickles.load(data, "f.pt")
    except CheckpointError:
        return
    assert isinstance(found, pickles.Inert)
    assert name.lstrip("_")[0].isupper()


@settings(max_examples=150)
@given(st.data())
def test_damaged_archives(data):
    """Bytes changed or cut off anywhere: read right, or our error; never another."""
    whole = bytearray(archive.small({"a": [1, 2, "three"]}))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    del whole[data.draw(st.sampled_from([len(whole), *range(len(whole))])) :]
    with tempfile.TemporaryFile() as file:
        file.write(whole)
        file.flush()
        fd = file.fileno()

        def read():
            opened = archive.open_archive(fd, 0, len(whole), "f.pt")
            return pickles.load(archive.read_member(fd, opened, "data.pkl"), "f.pt")

        try:
            assert read() == {"a": [1, 2, "three"]}
        except CheckpointError as fault:
            assert str(fault).startswith("f.pt")


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 5), max_size=3),
    st.data(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.int64]),
)
def test_tensors_of_torch_are_found(shape, data, dtype):
    """Any shape, any permutation, any element type; bytes where the pickle says."""
    order = data.draw(st.permutations(range(len(shape))))
    tensor = (
        (torch.arange(int(torch.tensor(shape).prod())) % 2).to(dtype).reshape(shape).permute(order)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.pt"
        torch.save([tensor], path)
        fd, opened = archive.open_file(path)
        try:
            thing = pickles.load(archive.read_member(fd, opened, "data.pkl"), "f.pt")
            (found,) = pickles.inlined(thing, fd, opened)
        finally:
            os.close(fd)
    assert (found.dtype.name, found.shape) == (
        str(dtype).removeprefix("torch."),
        tuple(tensor.shape),
    )
    assert found.data == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
