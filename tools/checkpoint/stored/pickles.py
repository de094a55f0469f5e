"""Pickles read without running anything in them, and written back under the same names.

A checkpoint names classes of torch, Megatron and numpy. None is imported: each becomes an inert
class that remembers how it was built (:class:`Inert`) and is pickled again under its own name.
Tensors become :class:`StoredTensor`, a shape over a storage of the archive.

Functions run when a pickle is loaded for real, so only those that rebuild data are known; any
other is refused by name, and so is anything of a module that can act on the machine.
"""

from __future__ import annotations

import argparse
import builtins
import collections
import copyreg
import io
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.stored import names
from megatron_moe.tools.checkpoint.stored.dtypes import BY_NAME, BY_STORAGE, DType

_PROTOCOL = 2
# Harmless as they are, and used as they are.
_REAL: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("argparse", "Namespace"): argparse.Namespace,
} | {
    ("builtins", name): getattr(builtins, name)
    for name in ("set", "frozenset", "complex", "slice", "range", "bytearray", "bytes", "int",
                 "float", "str", "bool", "list", "dict", "tuple", "object")
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Storage:
    """A record ``data/<key>`` of an archive."""

    dtype: DType
    key: str
    numel: int
    location: str = "cpu"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        """Element type."""
        return self.storage.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class _Named(type):
    """Metaclass of inert classes: each stands for one global name."""

    foreign: tuple[str, str]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made: Any = object.__new__(cls)  # type: ignore[arg-type]
        made._args, made._called = args, True
        return made

    def __repr__(cls) -> str:
        return ".".join(cls.foreign)

    def __eq__(cls, other: object) -> bool:
        return isinstance(other, _Named) and cls.foreign == other.foreign

    def __hash__(cls) -> int:
        return hash(cls.foreign)


class Inert(metaclass=_Named):
    """An object of a class that was not imported.

    Attributes:
        _args: Arguments it was built from.
        _called: Whether its class was called, as against made by ``__new__``.
        _state: What ``__setstate__`` would have got.
    """

    foreign: ClassVar[tuple[str, str]] = ("", "")
    _args: tuple = ()
    _called = False
    _state: Any = None
    _list: list | None = None
    _dict: dict | None = None

    def __new__(cls, *args: Any) -> Inert:
        """Make an object without calling its class."""
        made = object.__new__(cls)
        made._args = args
        return made

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def append(self, item: Any) -> None:
        """Take an item, as a list's subclass does when it is unpickled."""
        self.extend([item])

    def extend(self, items: Iterable[Any]) -> None:
        """Take items."""
        self._list = [*(self._list or []), *items]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._dict = (self._dict or {}) | {key: value}

    def __eq__(self, other: object) -> bool:
        # Built by a call from arguments (an enum's member): a value. Else an object like any.
        if not (self._called and isinstance(other, Inert) and other._called):
            return self is other
        return type(self) is type(other) and self._args == other._args

    def __hash__(self) -> int:
        return hash((type(self), repr(self._args))) if self._called else id(self)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self._args))
        return f"{type(self)!r}({shown})"

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__.get("_state")
        if isinstance(state, dict) and name in state:
            return state[name]
        raise AttributeError(name)


_CLASSES: dict[tuple[str, str], type[Inert]] = {}


def foreign(module: str, name: str) -> type[Inert]:
    """Return the inert class that stands for ``module.name``."""
    key = (module, name)
    if key not in _CLASSES:
        _CLASSES[key] = _Named(name, (Inert,), {"foreign": key})  # type: ignore[assignment]
    return _CLASSES[key]


def made(module: str, name: str, state: dict[str, Any]) -> Inert:
    """Return an inert object with attributes, as a dataclass instance is pickled."""
    thing = foreign(module, name).__new__(foreign(module, name))
    thing._state = state
    return thing


def dtype_of(value: Any) -> DType | None:
    """Return the element type that a pickled ``torch.<dtype>`` stands for."""
    if isinstance(value, _Named) and value.foreign[0] == "torch":
        return BY_NAME.get(value.foreign[1])
    return None


def torch_dtype(dtype: DType) -> type[Inert]:
    """Return what stands for ``torch.<dtype>`` in a pickle."""
    return foreign("torch", dtype.name)


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes, where: str, trusted: frozenset[str]) -> None:
        super().__init__(io.BytesIO(data))
        self.where, self.trusted = where, trusted

    def find_class(self, module: str, name: str) -> Any:
        module, name = names.modern(module, name)
        if (module, name) in _REAL:
            return _REAL[module, name]
        if not names.allowed(module, name, self.trusted):
            raise CheckpointError(
                f"{self.where}: its pickle asks for {module}.{name}, which could run code when "
                f"loaded. Nothing was run. If you know it to be harmless, pass "
                f"--trust {module}.{name}"
            )
        known = _TENSORS.get((module, name))
        return known if known else foreign(module, name)

    def persistent_load(self, pid: Any) -> Storage:
        kind, cls, key, location, numel = pid
        if kind != "storage":
            raise CheckpointError(f"{self.where}: persistent id {kind!r} is not torch's 'storage'")
        name = cls.foreign[1]
        dtype = BY_NAME["uint8"] if name == "UntypedStorage" else BY_STORAGE.get(name)
        if dtype is None:
            raise CheckpointError(f"{self.where}: storage type {name} is not known")
        return Storage(dtype, key, numel, location)


def _tensor(storage: Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> StoredTensor:
    found = StoredTensor(storage, offset, tuple(shape), tuple(strides))
    # Later code moves bytes by these numbers, so a view of foreign memory must not get through.
    steps = zip(found.shape, found.strides, strict=True)
    last = offset + sum((size - 1) * stride for size, stride in steps)
    if min(offset, *found.shape, *found.strides, storage.numel) < 0 or (
        found.numel and last >= storage.numel
    ):
        raise ValueError(
            f"a tensor of shape {found.shape}, strides {found.strides} from element {offset} does "
            f"not lie in its storage of {storage.numel}"
        )
    return found


def _tensor_of_type(
    storage: Storage, offset: int, shape: tuple, strides: tuple, grad: bool, hooks: Any,
    dtype: Any, *_: Any,
) -> StoredTensor:  # fmt: skip
    real = dtype_of(dtype) or storage.dtype
    typed = Storage(real, storage.key, storage.numel // real.itemsize, storage.location)
    return _tensor(typed, offset, shape, strides)


def _parameter(data: StoredTensor, *_: Any) -> StoredTensor:
    return data


def _from_type(rebuild: Any, cls: Any, args: tuple, state: Any) -> Any:
    return rebuild(*args)


_TENSORS = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_type,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
}


def load(data: bytes, where: str, trusted: frozenset[str] = frozenset()) -> Any:
    """Return what a pickle describes, with inert stand-ins.

    Args:
        data: The pickle.
        where: File named in errors.
        trusted: Names (``module.function``) let through, still not run.

    Raises:
        CheckpointError: A name that could run code, or bytes that are no pickle.
    """
    copyreg.clear_extension_cache()  # what is cached there would be used without being asked for
    try:
        return _Reader(data, where, trusted).load()
    except CheckpointError:
        raise
    except Exception as fault:
        raise CheckpointError(
            f"{where}: not a readable pickle ({type(fault).__name__}: {fault}). The file is "
            "truncated or damaged: restore it from a copy"
        ) from fault


class _Writer(pickle._Pickler):  # type: ignore[name-defined]
    """Python's own pickler: the C one insists on importing every name."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Storage):
            return None
        typed = obj.dtype.storage
        numel = obj.numel if typed else obj.numel * obj.dtype.itemsize
        named = foreign("torch", typed) if typed else foreign("torch.storage", "UntypedStorage")
        return ("storage", named, obj.key, obj.location, numel)

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if not isinstance(obj, _Named):
            super().save_global(obj, name)  # type: ignore[misc]
            return
        module, qualified = obj.foreign
        writer: Any = self
        writer.write(pickle.GLOBAL + f"{module}\n{qualified}\n".encode())
        writer.memoize(obj)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, StoredTensor):
            hooks: collections.OrderedDict = collections.OrderedDict()
            args = (obj.storage, obj.offset, obj.shape, obj.strides, False, hooks)
            if obj.dtype.storage:
                return foreign("torch._utils", "_rebuild_tensor_v2"), args
            return foreign("torch._utils", "_rebuild_tensor_v3"), (*args, torch_dtype(obj.dtype))
        if isinstance(obj, Inert):
            cls = type(obj)
            items = iter(obj._list) if obj._list else None
            pairs = iter(obj._dict.items()) if obj._dict else None
            if obj._called:
                return cls, obj._args, obj._state, items, pairs
            return copyreg.__newobj__, (cls, *obj._args), obj._state, items, pairs  # type: ignore[attr-defined]
        return NotImplemented


def dump(thing: Any) -> bytes:
    """Return the pickle of ``thing``, protocol 2 as `torch.save` writes it."""
    out = io.BytesIO()
    _Writer(out, protocol=_PROTOCOL).dump(thing)
    return out.getvalue()


@dataclass(frozen=True)
class Literal:
    """A small tensor with its bytes: what is neither weight nor optimizer state."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes


def _gathered(tensor: StoredTensor, data: bytes, where: str) -> bytes:
    """Return a tensor's elements in row-major order from its storage's bytes."""
    size = tensor.dtype.itemsize
    if len(data) != tensor.storage.numel * size:
        raise CheckpointError(
            f"{where}: record data/{tensor.storage.key} should have {tensor.storage.numel * size} "
            f"bytes, has {len(data)}: the file is damaged"
        )
    elements = np.frombuffer(data, f"V{size}")[tensor.offset :]
    strides = [stride * size for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(elements, tensor.shape, strides).tobytes()


def inlined(thing: Any, fd: int, archive: Any) -> Any:
    """Return a copy of a pickled structure with its tensors' bytes read in.

    Args:
        thing: What :func:`load` returned.
        fd: Its file, open.
        archive: The opened archive.
    """
    from megatron_moe.tools.checkpoint.stored.archive import read_member

    def visit(value: Any) -> Any:
        if isinstance(value, StoredTensor):
            data = read_member(fd, archive, f"data/{value.storage.key}")
            return Literal(value.dtype, value.shape, _gathered(value, data, archive.where))
        if type(value) in (dict, collections.OrderedDict):
            return type(value)((key, visit(item)) for key, item in value.items())
        if type(value) in (list, tuple):
            return type(value)(visit(item) for item in value)
        return value

    return visit(thing)
