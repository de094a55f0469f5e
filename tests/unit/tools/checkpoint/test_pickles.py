"""Pickles: what a checkpoint holds goes through unchanged, and nothing in it is ever run."""

import argparse
import collections
import copyreg
import functools
import io
import operator
import os
import pickle
import signal
import subprocess
from datetime import date, timedelta
from pathlib import PosixPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.stored import pickles
from megatron_moe.tools.checkpoint.stored.dtypes import BY_NAME


def through(thing: object, protocol: int = 2) -> object:
    """Read what Python pickled, write it again, and let Python read that."""
    read = pickles.load(pickle.dumps(thing, protocol), "x")
    return pickle.loads(pickles.dump(read))


def test_arguments_go_through_unchanged():
    args = argparse.Namespace(
        num_layers=2,
        lr=1e-3,
        params_dtype=torch.bfloat16,
        exit_signal=signal.SIGTERM,
        attention=WriteItemType.TENSOR,
        layout=torch.strided,
        device=torch.device("cpu"),
        path=PosixPath("/data"),
        timeout=timedelta(minutes=3),
        betas=(0.9, 0.95),
        names={"a", "b"},
        blend=None,
        nested={"x": [1, {"y": (True, b"\xff\x00")}]},
        shape=torch.Size([2, 3]),
        ordered=collections.OrderedDict(b=1, a=2),
        defaults=collections.defaultdict(list, {"a": [1]}),
        big=2**70,
        number=complex(1, 2),
        range=range(3),
        when=date(2026, 1, 2),
        simple=SimpleNamespace(a=1),
    )
    for protocol in (2, 3, 4, 5):
        assert through(args, protocol) == args


def test_arguments_can_be_read_without_their_classes():
    args = argparse.Namespace(exit_signal=signal.SIGTERM, params_dtype=torch.bfloat16, layers=2)
    read = pickles.load(pickle.dumps(args, 2), "x")
    assert read.layers == 2
    assert isinstance(read.exit_signal, pickles.Inert)
    assert repr(read.exit_signal) == "signal.Signals(15)"
    assert pickles.dtype_of(read.params_dtype) is BY_NAME["bfloat16"]


def test_classes_that_are_not_there_keep_their_names():
    named = b"\x80\x02cmegatron.core.gone\nAttnBackend\nK\x05\x85R."
    read = pickles.load(named, "x")
    assert repr(read) == "megatron.core.gone.AttnBackend(5)"
    again = pickles.load(pickles.dump(read), "x")
    assert again == read
    assert b"cmegatron.core.gone\nAttnBackend\n" in pickles.dump(read)


def test_equal_members_of_an_enum_are_equal():
    one, same, other = (
        pickles.load(pickle.dumps(s, 2), "x")
        for s in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
    )
    assert one == same and hash(one) == hash(same)
    assert one != other


def test_a_shared_object_stays_shared():
    one = collections.OrderedDict(a=1)
    found = through([one, one])
    assert found[0] is found[1]


def test_numpys_random_state_goes_through():
    state = np.random.RandomState(5).get_state()
    found = through(state)
    assert found[0] == state[0]
    assert (found[1] == state[1]).all()
    assert found[2:] == state[2:]
    assert through(np.float32(2.5)) == np.float32(2.5)


def test_torchs_checkpoint_metadata_goes_through():
    index = MetadataIndex("w", torch.Size([0, 2]), 1)
    whole = Metadata(
        {
            "w": TensorStorageMetadata(
                TensorProperties(dtype=torch.bfloat16, requires_grad=True),
                torch.Size([2, 4]),
                [ChunkStorageMetadata(torch.Size([0, 2]), torch.Size([2, 2]))],
            ),
            "o": BytesStorageMetadata(),
        },
        planner_data={"w": ("w",)},
        storage_data={index: _StorageInfo("__0_0.distcp", 5, 9), MetadataIndex("o"): 3},
    )
    found = through(whole)
    assert found == whole
    assert found.state_dict_metadata["w"].properties.dtype == torch.bfloat16
    assert found.storage_data[index] == _StorageInfo("__0_0.distcp", 5, 9)


def test_made_objects_are_those_of_the_class():
    built = pickles.made(
        "torch.distributed.checkpoint.filesystem", "_StorageInfo",
        {"relative_path": "a", "offset": 1, "length": 2, "transform_descriptors": None},
    )  # fmt: skip
    assert pickle.loads(pickles.dump(built)) == _StorageInfo("a", 1, 2)


def test_attributes_of_the_unknown_are_readable():
    built = pickles.made("m", "Thing", {"size": 3})
    assert built.size == 3
    with pytest.raises(AttributeError, match="width"):
        _ = built.width


class Evil:
    """Pickles itself as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def _named(module: str, name: str, argument: bytes = b"K\x01") -> bytes:
    """A protocol 2 pickle that calls ``module.name(1)``."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + argument + b"\x85R."


def _stacked(module: str, name: str, argument: bytes) -> bytes:
    """A protocol 4 pickle that calls it, the name given by STACK_GLOBAL."""
    short = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)]
    return b"\x80\x04" + b"".join(short) + b"\x93" + argument + b"\x85R."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("builtins", "open"),
        ("builtins", "compile"),
        ("builtins", "type"),
        ("__builtin__", "eval"),
        ("subprocess", "Popen"),
        ("subprocess", "run"),
        ("operator", "attrgetter"),
        ("operator", "methodcaller"),
        ("torch.hub", "load"),
        ("torch", "load"),
        ("torch", "save"),
        ("torch.serialization", "load"),
        ("torch.utils.cpp_extension", "load_inline"),
        ("torch", "_inductor.codecache.compile_file"),
        ("functools", "partial"),
        ("numpy.testing._private.utils", "runstring"),
        ("numpy", "load"),
        ("copyreg", "add_extension"),
        ("copyreg", "__newobj__"),
        ("importlib", "import_module"),
        ("runpy", "run_path"),
        ("pickle", "loads"),
        ("shutil", "rmtree"),
        ("socket", "create_connection"),
        ("asyncio.subprocess", "Process"),
        ("multiprocessing.reduction", "DupFd"),
        ("__builtin__", "reduce"),
        ("types", "FunctionType"),
        ("types", "CodeType"),
        ("ctypes", "CDLL"),
        ("io", "FileIO"),
        ("_io", "FileIO"),
        ("io", "open"),
        ("logging", "FileHandler"),
        ("zipfile", "ZipFile"),
        ("tarfile", "TarFile"),
        ("shelve", "DbfilenameShelf"),
        ("dbm.dumb", "_Database"),
        ("torch.package", "PackageImporter"),
        ("torch.jit", "CompilationUnit"),
        ("torch._dynamo.package", "CompilePackage"),
        ("torch.utils.cpp_extension", "BuildExtension"),
        ("numpy.f2py", "Compiler"),
        ("setuptools._distutils.ccompiler", "CCompiler"),
        ("megatron.core.tensor_parallel.random", "get_cuda_rng_tracker"),
    ],
)
def test_what_could_act_is_refused_by_name(module, name):
    for data in (_named(module, name), _stacked(module, name, b"K\x01")):
        with pytest.raises(CheckpointError) as caught:
            pickles.load(data, "f.pt")
        modern = f"{module}.{name}".replace("__builtin__.reduce", "functools.reduce")
        modern = modern.replace("__builtin__", "builtins")
        assert str(caught.value).startswith(f"f.pt: its pickle asks for {modern}, which could run")
        assert f"pass --trust {modern}" in str(caught.value)


def _commands(path: str) -> dict[str, bytes]:
    """Pickles that would make a file, each by other opcodes."""
    touch = f"touch {path}"
    text = touch.encode()
    argument = b"\x8c" + bytes([len(text)]) + text
    quoted = b"S'" + text + b"'\n"
    return {
        "REDUCE": pickle.dumps(Evil(os.system, touch), 2),
        "REDUCE 4": pickle.dumps(Evil(os.system, touch), 4),
        "popen": pickle.dumps(Evil(subprocess.Popen, ["touch", path]), 2),
        "eval": pickle.dumps(Evil(eval, f"open({path!r}, 'w')"), 2),
        "exec": pickle.dumps(Evil(exec, f"open({path!r}, 'w')"), 2),
        "open": pickle.dumps(Evil(open, path, "w"), 2),
        "partial": pickle.dumps(functools.partial(os.system, touch), 2),
        "methodcaller": pickle.dumps(operator.methodcaller("touch"), 2),
        "nested": pickle.dumps([1, {"a": (Evil(os.system, touch),)}], 2),
        "FileIO": pickle.dumps(Evil(io.FileIO, path, "w"), 2),
        "STACK_GLOBAL": _stacked("posix", "system", argument),
        "INST": b"(" + quoted + b"iposix\nsystem\n.",
        "OBJ": b"(cposix\nsystem\n" + quoted + b"o.",
        "dotted": _stacked("torch", "serialization.os.system", argument),
        "dotted in a class": _stacked("argparse", "Namespace.__init__.__globals__", argument),
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n" + argument + b"\x85\x81.",
        "setstate": b"\x80\x02cargparse\nNamespace\n)\x81}(X\x0c\x00\x00\x00__setstate__cposix\n"
        b"system\nub" + argument + b"b.",
        "memo": b"\x80\x02cposix\nsystem\nq\x000h\x00" + argument + b"\x85R.",
    }


@pytest.mark.parametrize("how", list(_commands("x")))
def test_nothing_runs(how, tmp_path):
    made = tmp_path / "made"
    with pytest.raises(CheckpointError, match=r"f\.pt: its pickle asks for [\w.]+, which could"):
        pickles.load(_commands(str(made))[how], "f.pt")
    assert not made.exists()


def test_registered_extension_codes_are_refused_too(tmp_path):
    copyreg.add_extension("posix", "system", 240)
    try:
        text = f"touch {tmp_path / 'made'}".encode()
        data = b"\x80\x02\x82\xf0\x8c" + bytes([len(text)]) + text + b"\x85R."
        with pytest.raises(CheckpointError, match=r"asks for posix\.system"):
            pickles.load(data, "f.pt")
    finally:
        copyreg.remove_extension("posix", "system", 240)
    assert not (tmp_path / "made").exists()
    with pytest.raises(CheckpointError, match=r"not a readable pickle \(ValueError: unregistered"):
        pickles.load(b"\x80\x02\x82\xf1.", "f.pt")


def test_an_extension_that_another_reader_has_cached_is_refused(tmp_path):
    copyreg.add_extension("posix", "system", 240)
    try:
        assert pickle.loads(b"\x80\x02\x82\xf0.") is os.system
        with pytest.raises(CheckpointError, match=r"asks for posix\.system"):
            pickles.load(b"\x80\x02\x82\xf0.", "f.pt")
    finally:
        copyreg.remove_extension("posix", "system", 240)


def test_names_of_python_2_are_taken_for_what_they_became(tmp_path):
    data = pickle.dumps(Evil(subprocess.Popen, ["touch", "x"]), 2)
    assert b"commands\nPopen" in data
    with pytest.raises(
        CheckpointError, match=r"asks for subprocess\.Popen, .*--trust subprocess\.Popen"
    ):
        pickles.load(data, "f.pt")


def test_building_an_inert_object_calls_nothing_of_its_class():
    # BUILD would call __setstate__ of the real class.
    data = b"\x80\x02cmegatron.core.x\nThing\n)\x81}X\x01\x00\x00\x00aK\x01sb."
    read = pickles.load(data, "x")
    assert isinstance(read, pickles.Inert)
    assert read.a == 1


def test_a_trusted_name_passes_and_stays_inert(tmp_path):
    made = tmp_path / "made"
    data = _commands(str(made))["REDUCE 4"]
    read = pickles.load(data, "f.pt", frozenset({"posix.system"}))
    assert isinstance(read, pickles.Inert)
    assert repr(read) == f"posix.system('touch {made}')"
    assert not made.exists()
    with pytest.raises(CheckpointError, match=r"asks for posix\.system"):
        pickles.load(data, "f.pt", frozenset({"posix.popen"}))


def test_streams_of_transformer_engine_are_let_through():
    stream = io.BytesIO(b"abc")
    assert through(stream).getvalue() == b"abc"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x63.",
        b"\x80\x02K\x01",
        b"\x80\x02R.",
        b"\x80\x02X\xff\xff\xff\x7fa.",
        b"\x80\x02h\x05.",
        b"garbage",
        b"\x80\x02K\x05Q.",
        b"\x80\x02]a.",
    ],
)
def test_what_is_no_pickle_is_an_error_of_ours(data):
    with pytest.raises(
        CheckpointError, match=r"f\.pt: not a readable pickle .*restore it from a copy"
    ):
        pickles.load(data, "f.pt")


def test_storages_of_unknown_type_are_refused():
    names = b"storagectorch\nQInt8Storage\n"
    data = b"\x80\x02(X\x07\x00\x00\x00" + names + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ."
    with pytest.raises(CheckpointError, match=r"f\.pt: storage type QInt8Storage is not known"):
        pickles.load(data, "f.pt")
    with pytest.raises(CheckpointError, match=r"persistent id 'storagf' is not torch's 'storage'"):
        pickles.load(data.replace(b"storage", b"storagf", 1), "f.pt")
