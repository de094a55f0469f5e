"""Save on one layout, resume on another: what a worker does. Imports Megatron.

``torch`` is Megatron's plain format (one file of state dicts a rank, the same layout on return),
``torch_dist`` its distributed one (any layout on return).
"""

from pathlib import Path
from typing import Any

import torch
from helpers.runs import Job, Means
from helpers.training_run import Training
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy


class Resumable(Training):
    """A training run that can be saved and loaded."""

    def steps(self, count: int) -> list[list[tuple[float, int]]]:
        """Train; return each step's losses as :class:`RankRecord` has them."""
        losses = []
        for _ in range(count):
            losses.append(self.forward_backward())
            self.update()
        return losses

    def save(self, folder: Path, form: str) -> None:
        if form == "torch":
            state = {
                "model": [chunk.state_dict() for chunk in self.chunks],
                "optimizer": self.optimizer.state_dict(),
            }
            torch.save(state, folder / f"rank{torch.distributed.get_rank()}.pt")
            torch.distributed.barrier()
            return
        dist_checkpointing.save(
            self._sharded(is_loading=False),
            str(folder),
            TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
            content_metadata=_content(),
        )

    def load(self, folder: Path, form: str, *, optimizer: bool = True) -> None:
        if form == "torch":
            path = folder / f"rank{torch.distributed.get_rank()}.pt"
            state = torch.load(path, weights_only=False)
            for chunk, weights in zip(self.chunks, state["model"], strict=True):
                chunk.load_state_dict(weights, strict=True)
        else:
            state = dist_checkpointing.load(self._sharded(is_loading=True), str(folder))
            for i, chunk in enumerate(self.chunks):
                chunk.load_state_dict(state[f"model{i}"], strict=True)
        if optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.optimizer.reload_model_params()

    def _sharded(self, *, is_loading: bool) -> dict[str, Any]:
        metadata = _metadata()
        state: dict[str, Any] = {
            f"model{i}": chunk.sharded_state_dict(metadata=metadata)
            for i, chunk in enumerate(self.chunks)
        }
        models: dict[str, Any] = {}
        for part in list(state.values()):
            models |= part
        state["optimizer"] = self.optimizer.sharded_state_dict(
            models if len(self.chunks) > 1 else state["model0"],
            is_loading=is_loading,
            metadata=metadata,
        )
        return state


def _content() -> dict[str, Any]:
    return {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }


def _metadata() -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return _content() | {"dp_cp_group": group}


def save_and_go_on(world: Any, job: Job, means: Means, folder: str, form: str, more: int) -> list:
    """Train two steps, save, train ``more``; return the later losses."""
    training = Resumable(job, means)
    training.steps(2)
    training.save(Path(folder), form)
    return training.steps(more)


def resume(
    world: Any, job: Job, means: Means, folder: str, form: str, more: int, optimizer: bool
) -> list:
    """Load and train ``more`` steps; return their losses."""
    training = Resumable(job, means)
    training.load(Path(folder), form, optimizer=optimizer)
    return training.steps(more)
