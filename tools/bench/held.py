"""How many bytes a layer keeps from forward to backward: exact, whatever else the machine does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def held_bytes(layer: torch.nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that a forward leaves for its backward, parameters excluded.

    Counted are tensors saved for autograd, a view as its whole storage, and tensors that a Python
    autograd function keeps on its context in plain attributes. What a layer keeps on itself, as
    upstream's dispatcher does, is not counted.
    """
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    # The storages themselves, not their addresses: a freed address would be used again.
    held: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = layer(x)[0]
    for node in _graph(output.grad_fn):
        for tensor in _tensors(list(getattr(node, "__dict__", {}).values())):
            note(tensor)
    return sum(storage.nbytes() for storage in held.values())


def _graph(root: Any) -> Iterator[Any]:
    """Every node behind ``root``, once."""
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
