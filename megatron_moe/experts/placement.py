"""Tensors whose memory is a file: written through, and no part of the process's own memory.

A placed tensor is an ordinary tensor at an unusual address. What computes with it does not know,
so results cannot depend on the placement. :class:`Placing` extends it by one rule: what is made
like a placed tensor (a copy, its gradient, moments) is placed as well.

Each tensor has a file of its own, without a name in the folder from before the first byte is
written: whatever ends the process, no file is left behind, and none that looks complete.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Address of a mapping to the store that made it; an entry goes when its last tensor does.
_STORES: dict[int, FileStore] = {}


class FileStore:
    """Hands out tensors that lie in files of one folder.

    Args:
        folder: Where the files lie; it must exist.
        training_state: Whether gradients and optimizer state of placed parameters are placed too.

    Raises:
        ValueError: The folder is missing, or no file can be made in it.
    """

    def __init__(self, folder: Path, *, training_state: bool = False) -> None:
        self.folder, self.training_state = folder, training_state
        if not folder.is_dir():
            raise ValueError(
                f"moe_offload_dir ({folder}) must be an existing folder; make it, on a fast disk"
            )
        self._open().close()

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros, contiguous, on the CPU; without elements it lies in memory.

        Raises:
            ValueError: The disk has too little room.

        Cost: the disk blocks are taken now, so that a full disk shows here and not later as a
            bus error; they are written when the tensor is. One file descriptor while it lives.
        """
        count = torch.Size(shape).numel()
        nbytes = count * dtype.itemsize
        if not nbytes:
            return torch.zeros(shape, dtype=dtype)
        with self._open() as file:
            self._take(file, nbytes)
            memory = mmap.mmap(file.fileno(), nbytes)
        flat = torch.frombuffer(memory, dtype=dtype, count=count)
        address = flat.data_ptr()
        _STORES[address] = self
        weakref.finalize(memory, _STORES.pop, address)
        return flat.view(shape).data  # a tensor of its own, not a view of the flat one

    def _open(self) -> IO[bytes]:
        try:
            return tempfile.TemporaryFile(dir=self.folder)
        except OSError as error:
            raise ValueError(
                f"moe_offload_dir ({self.folder}) must be a folder that files can be made in: "
                f"{error.strerror}; choose another, or free it"
            ) from error

    def _take(self, file: IO[bytes], nbytes: int) -> None:
        free = shutil.disk_usage(self.folder).free
        try:
            if nbytes > free:
                raise OSError
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:
                file.truncate(nbytes)
        except OSError as error:
            raise ValueError(
                f"moe_offload_dir ({self.folder}) has no room for another {nbytes:,} bytes, "
                f"{free:,} are free; choose another, or use more expert-parallel ranks"
            ) from error


def store_of(tensor: Tensor) -> FileStore | None:
    """The store whose file the tensor (or what it is a view of) lies in; None in memory."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return None
    return _STORES.get(tensor.untyped_storage().data_ptr())


def is_placed(tensor: Tensor) -> bool:
    """Whether the tensor lies in a file."""
    return store_of(tensor) is not None


class Placing(TorchDispatchMode):
    """While active, what is made like a placed tensor is placed, if its store takes such state.

    Smaller ones than a page stay in memory: each would take a page all the same.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled; torch would import its compiler, for seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace what zeros_like, empty_like, clone and conversions of placed tensors make."""
        kwargs = kwargs or {}
        made = None
        if func in _MAKE_LIKE and args[0].is_contiguous():
            made = _made_like(args[0], kwargs.get("dtype") or args[0].dtype)
        if made is None:
            return func(*args, **kwargs)
        return made.copy_(args[0]) if _MAKE_LIKE[func] else made


# Whether the values are copied too.
_MAKE_LIKE = {
    torch.ops.aten.zeros_like.default: False,
    torch.ops.aten.empty_like.default: False,
    torch.ops.aten.clone.default: True,
    torch.ops.aten._to_copy.default: True,
}


def _made_like(like: Tensor, dtype: torch.dtype) -> Tensor | None:
    store = store_of(like)
    if store is None or not store.training_state or like.numel() * dtype.itemsize < mmap.PAGESIZE:
        return None
    return store.zeros(tuple(like.shape), dtype)


class PlacingBuffers(Placing):
    """Places the buffers that Megatron's DDP makes for parameters of which some are placed.

    Args:
        buffer: Megatron's ``_ParamAndGradBuffer``, while it is built.
        store: Of the placed parameters.
        holds_parameters: Whether the buffer is to hold the parameters, besides the gradients.
    """

    def __init__(self, buffer: Any, store: FileStore, *, holds_parameters: bool) -> None:
        super().__init__()
        self.buffer, self.store, self.holds_parameters = buffer, store, holds_parameters

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace ``zeros(numel)``: first the parameters, if there, then the gradients."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.zeros.default and list(args[0]) == [self._numel()]:
            parameters = self.holds_parameters and self.buffer.param_data is None
            if parameters or self.store.training_state:
                return self.store.zeros(tuple(args[0]), kwargs["dtype"])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _numel(self) -> int | None:
        return getattr(self.buffer, "numel", None)  # set by the buffer before it allocates
