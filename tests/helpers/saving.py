"""Save and resume with Megatron's own training code: what a worker does. Imports Megatron.

The steps are those of Megatron's ``pretrain``, without its data loaders, its log and its exit. The
pool puts all of Megatron's module globals back after each call.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from helpers.saved_run import SAMPLES, VOCABULARY, SavedRun
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.core.utils import get_model_config
from megatron.training import argument_utils, get_args, get_timers, training
from megatron.training.arguments import parse_and_validate_args
from megatron.training.initialize import initialize_megatron
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader


class Run:
    """A run of Megatron on this rank, started from ``--load`` if that is given."""

    def __init__(self, run: SavedRun, *more_flags: str) -> None:
        with _command_line([*run.command_line(), *more_flags]):
            self.args = parse_and_validate_args()
        initialize_megatron()
        config = argument_utils.gpt_config_from_args(self.args)
        self.model, self.optimizer, self.scheduler = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            checkpointing_context={},
            cfg_container=argument_utils.pretrain_cfg_container_from_args(self.args, config),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        self.iteration = self.args.iteration
        self.config = get_model_config(self.model[0])
        self._prepare()
        start = self.args.consumed_train_samples
        iterators = [RerunDataIterator(micro_batches(start)) for _ in self.model]
        self._data = iterators if len(iterators) > 1 else iterators[0]

    def _prepare(self) -> None:
        for chunk in self.model:
            chunk.train()
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.timers = get_timers()
        if self.config.finalize_model_grads_func is None:  # as Megatron does
            self.config.finalize_model_grads_func = finalize_model_grads
        if self.args.overlap_grad_reduce:
            syncs = [chunk.no_sync for chunk in self.model]
            self.config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
        get_timers()("interval-time", log_level=0).start(barrier=False)  # a save stops it

    def steps(self, count: int) -> list[float]:
        """Train; return each step's loss, after all ranks of the last stage said the same."""
        mine = [self._step() for _ in range(count)]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        known = [losses for losses in everyone if None not in losses]
        assert known and all(losses == known[0] for losses in known), everyone
        return known[0]

    def _step(self) -> float | None:
        found, skipped, *_ = training.train_step(
            forward_step,
            self._data,
            self.model,
            self.optimizer,
            self.scheduler,
            self.config,
            get_forward_backward_func(),
            iteration=self.iteration,
        )
        assert not skipped
        self.iteration += 1
        self.args.iteration = self.iteration
        self.args.consumed_train_samples += SAMPLES
        return float(found["lm loss"]) if found else None

    def save(self) -> None:
        """Save as Megatron's training loop does."""
        training.save_checkpoint_and_time(
            *(self.iteration, self.model, self.optimizer, self.scheduler, 0, {}),
            train_data_iterator=self._data,
        )


def train_and_save(run: SavedRun, folder: str, before: int, more: int) -> list[float]:
    """Do as `saved_run.train_and_save` says."""
    flags = ["--save", folder, "--save-interval", str(before)]
    if run.optimizer == "none":
        flags.append("--no-save-optim")
    started = Run(run, *flags)
    losses = started.steps(before)
    started.save()
    return losses + started.steps(more)


def resume(run: SavedRun, folder: str, more: int, strict: bool) -> list[float]:
    """Do as `saved_run.resume` says."""
    flags = ["--load", folder, "--exit-on-missing-checkpoint"]
    if run.optimizer == "none":
        flags.append("--no-load-optim")
    with _strict(run) if strict else nullcontext():
        started = Run(run, *flags)
    name = (Path(folder) / "latest_checkpointed_iteration.txt").read_text().strip()
    iteration = 0 if name == "release" else int(name)
    assert started.iteration == iteration
    assert started.args.consumed_train_samples == iteration * SAMPLES
    if run.optimizer != "none":
        assert started.scheduler.num_steps == iteration * SAMPLES
    return started.steps(more)


def micro_batches(start: int) -> Iterator[dict[str, Tensor]]:
    """Yield this data-parallel rank's micro-batches; a sample depends on its number alone.

    A token follows from the one before, mostly, so that there is something to learn.

    Args:
        start: Samples that the run has had, all ranks together.
    """
    rank = parallel_state.get_data_parallel_rank()
    size = parallel_state.get_data_parallel_world_size()
    for number in range(start + rank, 1 << 30, size):
        generator = torch.Generator().manual_seed(1000 + number)
        length = get_args().seq_length + 1
        noise = torch.randint(2, (length,), generator=generator)
        start_token = int(torch.randint(VOCABULARY, (1,), generator=generator))
        text = ((start_token + 7 * torch.arange(length) + noise) % VOCABULARY)[None]
        yield {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}


def forward_step(data: Iterator[dict[str, Tensor]], model: Any) -> Any:
    """Run one micro-batch, as ``pretrain_gpt.py`` does."""
    batch = next(data)
    tokens, labels = batch["tokens"], batch["labels"]
    mask = torch.ones(tokens.shape)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    output = model(tokens, positions, None, labels=labels, loss_mask=mask)
    return output, partial(_loss, mask)


def _loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total = (losses.float() * mask).sum()
    count = mask.sum().int()
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


@contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    rank, size = dist.get_rank(), dist.get_world_size()
    environ = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    with mock.patch.dict(os.environ, environ), mock.patch.object(sys, "argv", ["train", *words]):
        yield


@contextmanager
def _strict(run: SavedRun) -> Iterator[None]:
    """Fail after a load that left a key over on either side.

    Megatron's own strictest setting refuses every checkpoint of another TP or PP, as it reads no
    random states then, and ends in a TypeError with torch 2.15; and what Megatron cannot load into
    a model strictly, it loads without strictness.
    """
    faults: list[str] = []
    load_tensors = TorchDistLoadShardedStrategy.load
    load_module = torch.nn.Module.load_state_dict

    def load_sharded(self: Any, state: Any, folder: Any, *args: Any) -> Any:
        faults.extend(_left_over(run, state, folder))
        return load_tensors(self, state, folder, *args)

    def load(self: Any, state: Any, strict: bool = True, **kwargs: Any) -> Any:
        try:
            return load_module(self, state, strict=strict, **kwargs)
        except RuntimeError as error:
            faults.append(str(error))
            raise

    with (
        mock.patch.object(TorchDistLoadShardedStrategy, "load", load_sharded),
        mock.patch.object(torch.nn.Module, "load_state_dict", load),
    ):
        yield
    assert not faults, "\n".join(faults)


def _left_over(run: SavedRun, state: Any, folder: Path) -> list[str]:
    """Compare the keys in the folder with those that the ranks ask for."""
    asked: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(asked, {part.key for part in nested_values(state)})
    wanted = set().union(*asked)
    names = FileSystemReader(folder).read_metadata().state_dict_metadata
    stored = {name.partition("/shard_")[0] for name in names} - {"common_state"}
    ignored = ("rng_state", "rerun_state_machine")
    if run.optimizer == "none":
        ignored += ("optimizer", "chained_")
    unread = sorted(key for key in stored - wanted if not key.startswith(ignored))
    absent = sorted(wanted - stored)
    faults = []
    if unread:
        faults.append(f"keys of the checkpoint that no rank asks for: {unread}")
    if absent:
        faults.append(f"keys that the checkpoint has not: {absent}")
    return faults
