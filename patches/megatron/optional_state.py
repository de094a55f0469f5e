"""A router's own state, or experts' masks, may be absent from a checkpoint saved without them."""

import logging
import re
from collections.abc import Callable
from typing import Any

from megatron_moe.mcore.patching import Patch

_log = logging.getLogger("megatron_moe.checkpoint")
# Everything of a router, or of sparse experts, that Megatron has no name for.
_OURS = re.compile(
    r"\.router\.(?!weight$|bias$|expert_bias$|qb_beta$)\w+$|\.linear_fc[12]\.(mask(_[wv])?|fp8_\w+)$"
)


def _load(
    original: Callable[..., Any],
    sharded_state_dict: Any,
    checkpoint_dir: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from torch.distributed.checkpoint import FileSystemReader

    def keys(value: Any) -> set[str]:
        ours = isinstance(value, ShardedTensor | ShardedTensorFactory) and _OURS.search(value.key)
        if not ours:
            return set()
        parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
        return {part.key for part in parts}

    asked = {key for value in nested_values(sharded_state_dict) for key in keys(value)}
    if asked:
        # Megatron's own listing makes empty tensors, by an argument that newer torch has not.
        absent = asked - FileSystemReader(checkpoint_dir).read_metadata().state_dict_metadata.keys()
        if absent:
            _log.warning("not in the checkpoint, left as it is: %s", ", ".join(sorted(absent)))
            _, sharded_state_dict = extract_matching_values(
                sharded_state_dict, lambda value: bool(keys(value) & absent)
            )
    return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)


PATCHES = (
    Patch(
        target="megatron.core.dist_checkpointing.serialization.load",
        wrapper=_load,
        reason="a tensor that the model asks for and the checkpoint has not ends the load, "
        "whatever the strictness; an option that keeps state could only start with a fresh run",
        retire_when="a sharded tensor can say that it is optional",
        versions=">=0.19,<0.20",
        fingerprints=("40f333740e86",),
        holders=("megatron.core.dist_checkpointing",),
    ),
)
