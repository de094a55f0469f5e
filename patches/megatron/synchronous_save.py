"""A synchronous save needs no queue between processes."""

import queue
from collections.abc import Callable
from typing import Any

from megatron_moe.mcore.patching import Patch


def _save(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    outer = filesystem_async._results_queue
    # Writers of a synchronous save are this process and its threads.
    filesystem_async._results_queue = queue.Queue()
    try:
        original(*args, **kwargs)
    finally:
        filesystem_async._results_queue = outer


PATCHES = (
    Patch(
        target="megatron.core.dist_checkpointing.strategies.torch.TorchDistSaveShardedStrategy.save",
        wrapper=_save,
        reason="each rank's first save spawns a process for a queue, which imports the training "
        "script and torch again: 15 s of CPU time a rank",
        retire_when="a synchronous save uses a queue of its own process",
        versions=">=0.19,<0.20",
        fingerprints=("9088cfbe89df",),
    ),
)
