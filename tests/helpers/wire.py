"""What travels between pytest and the workers: functions by file, tensors by value.

A worker must be able to run a function of any test file, although pytest (in importlib mode) gives
test files no importable name. So a function travels as (module name, file, qualified name), and the
worker loads the file under that same name, which also makes classes defined there picklable both
ways. Tensors travel as bytes: torch's own pickling through a connection would share memory and leak
file descriptors over a long session.
"""

import importlib
import importlib.util
import io
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

_loaded: dict[str, int] = {}  # module name -> mtime of the file it was loaded from


@dataclass(frozen=True)
class FunctionAddress:
    """Where a top-level function of a test file is found."""

    module: str
    file: str
    qualname: str


def address_of(function: Callable) -> FunctionAddress:
    """Return the address of ``function``.

    Raises:
        ValueError: The function is a lambda, a closure or a bound method.
    """
    qualname = getattr(function, "__qualname__", repr(function))
    if "<" in qualname or not hasattr(function, "__code__"):
        raise ValueError(f"{qualname} cannot be sent to a worker; use a top-level function")
    file, module = function.__code__.co_filename, function.__module__
    return FunctionAddress(Path(file).stem if module == "__main__" else module, file, qualname)


def find_function(address: FunctionAddress) -> Callable:
    """Import the file of ``address``, again if it changed, and return the function."""
    module = sys.modules.get(address.module)
    mtime = Path(address.file).stat().st_mtime_ns
    if module is None or _loaded.get(address.module, mtime) != mtime:
        module = _import(address)
    _loaded[address.module] = mtime
    return reduce(getattr, address.qualname.split("."), module)


def _import(address: FunctionAddress):
    sys.modules.pop(address.module, None)
    try:
        module = importlib.import_module(address.module)
        if Path(module.__file__ or "").samefile(address.file):
            return module
    except ImportError as error:
        if error.name is None or not f"{address.module}.".startswith(f"{error.name}."):
            raise
    spec = importlib.util.spec_from_file_location(address.module, address.file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[address.module] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[address.module]
        raise
    return module


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any):
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(obj, torch.Tensor):
            return NotImplemented
        plain = obj.detach().cpu().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
        return _tensor, (data, str(plain.dtype).removeprefix("torch."), tuple(plain.shape))


def _tensor(data: bytes, dtype: str, shape: tuple[int, ...]):
    import torch

    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
    return (
        flat.view(getattr(torch, dtype)).reshape(shape)
        if data
        else flat.new_empty(shape, dtype=getattr(torch, dtype))
    )


def pack(message: Any) -> bytes:
    """Return ``message`` as bytes; tensors by value, detached."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(message)
    return buffer.getvalue()


def unpack(data: bytes) -> Any:
    """Undo :func:`pack`."""
    return pickle.loads(data)
