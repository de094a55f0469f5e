"""Megatron's own way to another chunking: load a whole ``torch_dist`` checkpoint, save it.

    python -m megatron_moe.tools.bench.load_save SOURCE OUT

One process, gloo, CPU. ``load_plain_tensors`` of Megatron-Core 0.19 fails on torch 2.15 where it
lists the tensors (``empty() got an unexpected keyword argument 'strides'``), so the list is made
here; the load and the save are Megatron's. Prints its seconds, imports not counted.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_moe.activate import activate


def main(source: Path, out: Path) -> None:
    """Load one iteration's folder and save it to a new one, forced to disk."""
    with activate("cpu"):
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing import ShardedTensor

        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        begin = time.perf_counter()
        tensors = FileSystemReader(source).read_metadata().state_dict_metadata
        wanted = {
            key: ShardedTensor.from_rank_offsets(
                key, torch.empty(found.size, dtype=found.properties.dtype)
            )
            for key, found in tensors.items()
            if isinstance(found, TensorStorageMetadata)
        }
        state = dist_checkpointing.load(wanted, str(source), validate_access_integrity=False)
        loaded = time.perf_counter()
        sharded = {
            key: ShardedTensor.from_rank_offsets(key, value)
            if isinstance(value, torch.Tensor)
            else value
            for key, value in state.items()
        }
        out.mkdir(parents=True)
        dist_checkpointing.save(sharded, str(out))
        for path in out.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        saved = time.perf_counter()
        dist.destroy_process_group()
    print(f"seconds {saved - begin:.3f} load {loaded - begin:.3f} save {saved - loaded:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
