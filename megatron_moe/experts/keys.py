"""Expert names in plain state dicts: sequential and grouped spellings, each read by the other.

sequential ``local_experts.3.linear_fc1.weight`` ↔ grouped ``linear_fc1.weight3``
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_SEQUENTIAL = re.compile(r"local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias|mask)")
_GROUPED = re.compile(r"(linear_fc[12])\.(weight|bias)(\d+)")
_EXTRA = re.compile(r"(local_experts\.\d+\.)?linear_fc[12]\._extra_state\d*")


def accept_sequential_keys(module: Any, state_dict: dict, prefix: str, *_: Any) -> None:
    """Load hook of grouped experts."""
    _rename(state_dict, prefix, _SEQUENTIAL, r"\2.\3\1")


def accept_grouped_keys(module: Any, state_dict: dict, prefix: str, *_: Any) -> None:
    """Load hook of sequential experts."""
    _rename(state_dict, prefix, _GROUPED, r"local_experts.\3.\1.\2")


def whole_stack(entries: Mapping[str, Tensor], key: str, num_experts: int) -> Tensor | None:
    """One tensor of all experts, from ``key`` itself or from ``key0``, ``key1``, … all of them.

    Args:
        entries: Of a state dict.
        key: Without an expert's number.
        num_experts: e.

    Returns:
        ``(e, …)``; None where neither is complete.
    """
    keys = [f"{key}{i}" for i in range(num_experts)]
    if key not in entries and entries.keys() >= set(keys):
        return torch.stack([entries[one] for one in keys])
    return entries.get(key)


def _rename(state_dict: dict, prefix: str, pattern: re.Pattern, replacement: str) -> None:
    for key in [k for k in state_dict if k.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if pattern.fullmatch(name):
            state_dict[prefix + pattern.sub(replacement, name)] = state_dict.pop(key)
        elif _EXTRA.fullmatch(name):  # Transformer Engine's FP8 state; not ours
            del state_dict[key]
