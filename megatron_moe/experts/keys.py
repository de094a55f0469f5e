"""Expert names in plain state dicts: sequential and grouped spellings, each read by the other.

sequential ``local_experts.3.linear_fc1.weight`` ↔ grouped ``linear_fc1.weight3``
"""

from __future__ import annotations

import re
from typing import Any

_SEQUENTIAL = re.compile(r"local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias|mask)")
_GROUPED = re.compile(r"(linear_fc[12])\.(weight|bias)(\d+)")
_EXTRA = re.compile(r"(local_experts\.\d+\.)?linear_fc[12]\._extra_state\d*")


def accept_sequential_keys(module: Any, state_dict: dict, prefix: str, *_: Any) -> None:
    """Load hook of grouped experts."""
    _rename(state_dict, prefix, _SEQUENTIAL, r"\2.\3\1")


def accept_grouped_keys(module: Any, state_dict: dict, prefix: str, *_: Any) -> None:
    """Load hook of sequential experts."""
    _rename(state_dict, prefix, _GROUPED, r"local_experts.\3.\1.\2")


def _rename(state_dict: dict, prefix: str, pattern: re.Pattern, replacement: str) -> None:
    for key in [k for k in state_dict if k.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if pattern.fullmatch(name):
            state_dict[prefix + pattern.sub(replacement, name)] = state_dict.pop(key)
        elif _EXTRA.fullmatch(name):  # Transformer Engine's FP8 state; not ours
            del state_dict[key]
