"""Vocabulary ids for routers that ask for them: layers see hidden states only.

A hook on the model notes the ids of the micro-batch that goes through it. Without pipeline
parallelism the micro-batch last seen is the one whose layers run, also when they are computed again
in the backward pass.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_moe.route.hysteresis import hash_contexts
from megatron_moe.telemetry.counters import routers_of


def feed_token_ids(model: Any) -> None:
    """Let the routers of a model see its token ids, if any of them needs to.

    The plugin's builder does this. Who builds a ``GPTModel`` in another way calls it once.

    Args:
        model: A module whose ``forward`` takes ``input_ids`` ``(B, S)`` first.
    """
    routers = [r for r in routers_of(model) if r.needs_token_ids or r.needs_contexts]
    if not routers:
        return

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids_BS: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        hashed: dict[int, Tensor] = {}
        for router in routers:
            length = router.context_length
            if router.needs_contexts and length not in hashed:
                hashed[length] = hash_contexts(ids_BS, length)
            router.note_token_ids(ids_BS, hashed.get(length))

    model.register_forward_pre_hook(note, with_kwargs=True)
