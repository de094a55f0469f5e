"""Zip archives: torch reads ours, we read torch's, and damage is named."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.stored import archive, crc, dtypes, pickles
from megatron_moe.tools.checkpoint.stored.pickles import Storage, StoredTensor

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def read_tensor(path: Path, tensor: StoredTensor, opened: archive.Archive) -> bytes:
    """Gather a tensor's bytes in row-major order."""
    with path.open("rb") as file:
        data = archive.read_member(file.fileno(), opened, f"data/{tensor.storage.key}")
    elements = np.frombuffer(data, f"V{tensor.dtype.itemsize}")[tensor.offset :]
    strides = [n * tensor.dtype.itemsize for n in tensor.strides]
    return np.lib.stride_tricks.as_strided(elements, tensor.shape, strides).tobytes()


def load(path: Path) -> tuple[object, archive.Archive]:
    fd, opened = archive.open_file(path)
    try:
        return pickles.load(archive.read_member(fd, opened, "data.pkl"), str(path)), opened
    finally:
        os.close(fd)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_every_element_type_of_torch(tmp_path, dtype):
    size = torch.empty(0, dtype=dtype).element_size()
    tensor = (torch.arange(12 * size, dtype=torch.uint8) % 2).view(dtype).reshape(3, 4)
    torch.save({"a": tensor}, tmp_path / "a.pt")
    thing, opened = load(tmp_path / "a.pt")
    found = thing["a"]
    assert str(dtype) == f"torch.{found.dtype.name}"
    assert found.shape == (3, 4)
    assert read_tensor(tmp_path / "a.pt", found, opened) == raw(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_reads_every_element_type_of_ours(tmp_path, dtype):
    size = torch.empty(0, dtype=dtype).element_size()
    tensor = (torch.arange(12 * size, dtype=torch.uint8) % 2).view(dtype).reshape(3, 4)
    ours = dtypes.BY_NAME[str(dtype).removeprefix("torch.")]
    stored = StoredTensor(Storage(ours, "0", 12), 0, (3, 4), (4, 1))
    write(tmp_path / "a.pt", {"a": stored}, {"data/0": raw(tensor)})
    found = torch.load(tmp_path / "a.pt", weights_only=True)["a"]
    assert found.dtype == dtype
    assert raw(found) == raw(tensor)


def write(path: Path, thing: object, records: dict[str, bytes]) -> None:
    skeleton = archive.begin(thing)
    for name, data in records.items():
        skeleton.add(name, len(data), data)
    archive.close(skeleton)
    path.write_bytes(assemble(skeleton))


def assemble(skeleton: archive.Skeleton) -> bytes:
    crcs = {name: zlib.crc32(data) for name, data in skeleton.inline.items()}
    out = bytearray(skeleton.total())
    for at, header in skeleton.headers(crcs):
        out[at - skeleton.start : at - skeleton.start + len(header)] = header
    for name, at in zip(skeleton.names, skeleton.offsets, strict=True):
        out[at : at + len(skeleton.inline[name])] = skeleton.inline[name]
    out[skeleton.size :] = skeleton.directory(crcs)
    return bytes(out)


def test_reads_views_with_offset_and_strides(tmp_path):
    base = torch.arange(60.0).reshape(6, 10)
    views = {
        "rows": base[2:4],
        "transposed": base.t(),
        "every other": base[::2, 1::3],
        "repeated": base[0, :3].expand(4, 3),
        "scalar": base[5, 9],
        "empty": base[:0],
    }
    torch.save(views, tmp_path / "a.pt")
    thing, opened = load(tmp_path / "a.pt")
    assert len({view.storage.key for view in thing.values()}) == 1
    for name, view in views.items():
        assert thing[name].shape == view.shape
        assert read_tensor(tmp_path / "a.pt", thing[name], opened) == raw(view), name


def test_reads_parameters_and_subclasses(tmp_path):
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    tagged = torch.nn.Parameter(torch.arange(2.0))
    tagged.tensor_model_parallel = True
    torch.save({"w": weight, "tagged": tagged}, tmp_path / "a.pt")
    thing, opened = load(tmp_path / "a.pt")
    assert read_tensor(tmp_path / "a.pt", thing["w"], opened) == raw(weight)
    assert read_tensor(tmp_path / "a.pt", thing["tagged"], opened) == raw(tagged)


def test_small_is_what_torch_and_zip_read():
    thing = {"iteration": 7, "text": "ä", "list": [1, 2.5, None, True], "bytes": b"\x00\xff"}
    data = archive.small(thing)
    assert torch.load(io.BytesIO(data), weights_only=True) == thing
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        assert opened.testzip() is None
        assert {"archive/data.pkl", "archive/version"} <= set(opened.namelist())


def test_records_start_on_the_alignment_that_torch_uses(tmp_path):
    write(tmp_path / "a.pt", {}, {f"data/{i}": bytes([i]) * (i * 37) for i in range(20)})
    _, opened = load(tmp_path / "a.pt")
    assert all(member.offset % 64 == 0 for member in opened.members.values())
    with zipfile.ZipFile(tmp_path / "a.pt") as zipped:
        assert zipped.testzip() is None
        assert zipped.read("archive/data/19") == bytes([19]) * (19 * 37)


def test_an_archive_inside_a_file(tmp_path):
    skeleton = archive.close(archive.begin([1, 2], start=1000))
    path = tmp_path / "two.distcp"
    path.write_bytes(bytes(1000) + assemble(skeleton) + b"and more")
    with path.open("rb") as file:
        opened = archive.open_archive(file.fileno(), 1000, skeleton.total(), "two")
        assert opened.members["data.pkl"].offset % 64 == 1000 % 64
        data = archive.read_member(file.fileno(), opened, "data.pkl")
    assert pickles.load(data, "two") == [1, 2]


def test_an_archive_of_more_than_4_gib(tmp_path):
    # A sparse file: the big record is a hole, so it costs no disk and is never read.
    size, floats = 2**32 + 64, 4
    stored = {
        "big": StoredTensor(Storage(dtypes.BY_NAME["uint8"], "0", size), 0, (size,), (1,)),
        "last": StoredTensor(Storage(dtypes.FLOAT32, "1", floats), 0, (floats,), (1,)),
    }
    last = raw(torch.arange(4.0))
    skeleton = archive.begin(stored)
    skeleton.add("data/0", size)
    skeleton.add("data/1", len(last), last)
    archive.close(skeleton)
    crcs = {name: zlib.crc32(data) for name, data in skeleton.inline.items()}
    crcs["data/0"] = crc.zeros(size)
    path = tmp_path / "big.pt"
    with path.open("wb") as file:
        for at, header in skeleton.headers(crcs):
            file.seek(at)
            file.write(header)
        for name, at in zip(skeleton.names, skeleton.offsets, strict=True):
            if name in skeleton.inline:
                file.seek(at)
                file.write(skeleton.inline[name])
        file.seek(skeleton.size)
        file.write(skeleton.directory(crcs))
    assert path.stat().st_size == skeleton.total()
    _, opened = load(path)
    assert opened.members["data/0"].size == size
    with path.open("rb") as file:
        assert archive.read_member(file.fileno(), opened, "data/1") == last
    with zipfile.ZipFile(path) as zipped:
        assert zipped.getinfo("archive/data/0").file_size == size
        assert zipped.getinfo("archive/data/1").header_offset > 2**32
        assert zipped.read("archive/data/1") == last  # its CRC is checked here
    found = torch.load(path, mmap=True, weights_only=True)
    assert found["last"].tolist() == [0, 1, 2, 3]
    assert found["big"].shape == (size,)
    assert found["big"][-1] == 0


def test_more_records_than_a_plain_zip_counts(tmp_path):
    count = 0xFFFF
    write(tmp_path / "many.pt", {}, {f"data/{i}": b"" for i in range(count)})
    with zipfile.ZipFile(tmp_path / "many.pt") as zipped:
        assert len(zipped.namelist()) == count + 5
    _, opened = load(tmp_path / "many.pt")
    assert len(opened.members) == count + 5


def test_one_flipped_bit_is_found_and_its_record_named(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.arange(100.0)}, path)
    _, opened = load(path)
    data = bytearray(path.read_bytes())
    data[opened.members["data/0"].offset + 200] ^= 4
    path.write_bytes(data)
    torch.load(path, weights_only=True)  # torch itself does not notice
    with (
        path.open("rb") as file,
        pytest.raises(CheckpointError, match=r"a\.pt: record data/0 does not match its CRC"),
    ):
        archive.read_member(file.fileno(), opened, "data/0")
    data[opened.members["data.pkl"].offset + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.pt: record data\.pkl does not match its CRC"):
        load(path)


def test_every_truncation_is_an_error_of_ours(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.arange(100.0), "b": torch.arange(3)}, path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), *range(len(whole) - 200, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"a\.pt"):
            load(path)


def test_truncation_says_what_to_do(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.arange(100.0)}, path)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(
        CheckpointError, match=r"truncated, or not written by torch\.save\. Restore"
    ):
        load(path)


def test_a_damaged_directory_is_an_error_of_ours(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.arange(100.0)}, path)
    whole = path.read_bytes()
    at = whole.rfind(b"PK\x05\x06")
    size, start = struct.unpack("<II", whole[at + 12 : at + 20])
    accepted = 0
    for position in range(start, len(whole)):
        data = bytearray(whole)
        data[position] ^= 0xFF
        path.write_bytes(data)
        try:
            load(path)
            accepted += 1  # a field that is not needed: dates, versions, attributes
        except CheckpointError as fault:
            assert "a.pt" in str(fault)
    assert size and accepted < (len(whole) - start)


def test_compressed_records_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("archive/data.pkl", b"x" * 1000)
    with pytest.raises(CheckpointError, match=r"record archive/data\.pkl is compressed"):
        load(tmp_path / "a.pt")


def test_torchs_old_format_without_zip_is_refused(tmp_path):
    torch.save({"w": torch.arange(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"no zip directory at the end"):
        load(tmp_path / "a.pt")


def test_a_missing_record_is_named(tmp_path):
    torch.save({}, tmp_path / "a.pt")
    fd, opened = archive.open_file(tmp_path / "a.pt")
    try:
        with pytest.raises(CheckpointError, match=r"a\.pt: has no record data/5"):
            archive.read_member(fd, opened, "data/5")
    finally:
        os.close(fd)


def test_small_tensors_are_read_in(tmp_path):
    base = torch.arange(24, dtype=torch.int64).reshape(4, 6)
    torch.save({"view": base[1:3], "turned": base.t(), "in": [(base[3, 5],)]}, tmp_path / "a.pt")
    thing, opened = load(tmp_path / "a.pt")
    with (tmp_path / "a.pt").open("rb") as file:
        found = pickles.inlined(thing, file.fileno(), opened)
    assert found["view"].data == raw(base[1:3])
    assert found["turned"].data == raw(base.t())
    assert found["in"][0][0].data == raw(base[3, 5])
    assert found["in"][0][0].shape == ()


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(2, (4,), (1,)), (0, (2, 4), (4, 1)), (-1, (1,), (1,)), (3, (2,), (-1,)), (0, (-4,), (-1,))],
)
def test_a_view_beyond_its_storage_is_refused(offset, shape, strides):
    lying = StoredTensor(Storage(dtypes.FLOAT32, "0", 5), offset, shape, strides)
    with pytest.raises(CheckpointError, match=r"x: .* does not lie in its storage of 5"):
        pickles.load(pickles.dump([lying]), "x")


def test_a_record_of_another_size_is_refused(tmp_path):
    torch.save({"a": torch.arange(4)}, tmp_path / "a.pt")
    thing, opened = load(tmp_path / "a.pt")
    lying = StoredTensor(Storage(thing["a"].dtype, "0", 5), 0, (4,), (1,))
    with (
        (tmp_path / "a.pt").open("rb") as file,
        pytest.raises(CheckpointError, match=r"a\.pt: record data/0 should have 40 bytes, has 32"),
    ):
        pickles.inlined([lying], file.fileno(), opened)
