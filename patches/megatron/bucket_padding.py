"""The unpadded size of a gradient bucket ends with its last parameter."""

from collections.abc import Callable
from typing import Any

from megatron_moe.mcore.patching import Patch


def _compute_per_buffer_param_layout(
    original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    layout = original(*args, **kwargs)
    ends = [start for start, _ in layout.bucket_indices]
    for _, end, bucket in layout.param_index_map.values():
        ends[bucket] = max(ends[bucket], end)
    for bucket, (start, padded_end) in enumerate(layout.bucket_indices):
        if start + layout.per_bucket_numel_unpadded[bucket] != padded_end:
            # Only where Megatron cannot save: elsewhere its checkpoints have its own size.
            layout.per_bucket_numel_unpadded[bucket] = ends[bucket] - start
    return layout


PATCHES = (
    Patch(
        target="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
        "._compute_per_buffer_param_layout",
        wrapper=_compute_per_buffer_param_layout,
        reason="a bucket before a shared embedding counts padding as contents, and torch refuses "
        "to save a shard that ends beyond its tensor",
        retire_when="the bucket is closed at the end of its last parameter",
        versions=">=0.19,<0.20",
        fingerprints=("39a707680a77",),
    ),
)
