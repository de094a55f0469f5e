"""Train a small GPT on this rank of a layout; the other half of `runs.py`, imports Megatron."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from helpers.canonical import Piece, bias_pieces, pieces_of
from helpers.megatron_world import VOCABULARY, build_gpt, enter_layout, moe_config
from helpers.runs import Job, Means, RankRecord
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from torch import Tensor

from megatron_moe.config import MoEConfig
from megatron_moe.route.balance import balance_losses

_LOGGED = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


def global_batch(job: Job) -> list[tuple[Tensor, ...]]:
    """Return all micro-batches in order: tokens, labels, loss mask and padding, each ``(B, S)``."""
    generator = torch.Generator().manual_seed(7)
    shape = (job.num_sequences, job.sequence_length + 1)
    text = torch.randint(VOCABULARY, shape, generator=generator)
    mask = torch.ones(job.num_sequences, job.sequence_length)
    if job.masked_tokens:
        mask = (torch.rand(mask.shape, generator=generator) < 0.6).float()
        mask[:, 0] = 1.0
    padding = torch.zeros_like(mask, dtype=torch.bool)
    if job.padded_tokens:
        lengths = torch.randint(2, job.sequence_length, (job.num_sequences, 1), generator=generator)
        padding = torch.arange(job.sequence_length) >= lengths
        mask = mask * ~padding
    parts = (text[:, :-1], text[:, 1:], mask, padding)
    return list(zip(*(part.split(job.micro_batch_size) for part in parts), strict=True))


class Training:
    """A model with its optimizer on this rank."""

    def __init__(self, job: Job, means: Means) -> None:
        job = replace(job, moe=replace(job.moe, **means.moe))
        self.job, self.means = job, means
        self.places = enter_layout(means.layout)
        self.config = moe_config(means.layout, **(job.model | means.model))
        self.chunks = build_gpt(
            self.config,
            self.places,
            impl=means.impl,
            moe=job.moe,
            sequence_length=job.sequence_length,
            empty_experts=job.empty_experts,
        )
        self.ddp = [_wrap(self.config, chunk, i, means) for i, chunk in enumerate(self.chunks)]
        self.optimizer = _optimizer(self.ddp, means)
        self.config.grad_scale_func = self.optimizer.scale_loss
        if self.config.finalize_model_grads_func is None:  # as Megatron does
            self.config.finalize_model_grads_func = finalize_model_grads
        if means.overlap:
            syncs = [chunk.no_sync for chunk in self.ddp]
            self.config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]

    def forward_backward(self) -> list[tuple[float, int]]:
        """Give every parameter its gradient; return sum and count of each micro-batch's loss."""
        return _forward_backward(self.config, self.job, self.ddp, self.optimizer)

    def grads(self) -> list[Piece]:
        """Return this rank's pieces of the finalised gradients, without the loss scale."""
        if self.means.distributed_optimizer:
            _complete_sharded_grads(self.ddp)
        scale = float(self.optimizer.get_loss_scale())
        return self._pieces(lambda parameter: parameter.main_grad / scale)

    def weights(self) -> list[Piece]:
        """Return this rank's pieces of the weights, and the routers' expert biases."""
        self.gather_weights()
        return self._pieces(lambda parameter: parameter.data) + bias_pieces(self.ddp)

    def gather_weights(self) -> None:
        """Wait for what an optimizer step made, where it comes with the next forward pass."""
        for chunk in self.ddp:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def update(self) -> float:
        """Take an optimizer step; return the gradient norm before clipping."""
        succeeded, norm, _ = self.optimizer.step()
        assert succeeded
        return float(norm)

    def logged(self) -> dict[str, float]:
        """Return the MoE losses of the step."""
        dp_size = parallel_state.get_data_parallel_world_size()
        micro_batches = self.job.num_sequences // self.job.micro_batch_size // dp_size
        return logged_losses(self.config, micro_batches, self.job.moe)

    def _pieces(self, read: Callable[[Any], Tensor]) -> list[Piece]:
        return pieces_of(self.ddp, self.places, read, gated=self.config.gated_linear_unit)


def train_rank(job: Job, means: Means) -> RankRecord:
    """Run ``job`` by ``means`` on this rank of the team."""
    training = Training(job, means)
    losses, norms, logged, grads = [], [], [], []
    for step in range(job.steps):
        losses.append(training.forward_backward())
        if step == 0:
            grads = training.grads()
        norms.append(training.update())
        logged.append(training.logged())
    return RankRecord(
        losses=losses, grads=grads, grad_norms=norms, weights=training.weights(), logged=logged
    )


def _wrap(config: Any, chunk: Any, index: int, means: Means) -> DistributedDataParallel:
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=means.overlap,
        overlap_param_gather=means.overlap and means.distributed_optimizer,
        use_distributed_optimizer=means.distributed_optimizer,
        bucket_size=1000 if means.overlap else None,  # elements: several buckets even here
    )
    if config.bf16 or config.fp16:
        chunk = Float16Module(config, chunk)
    return DistributedDataParallel(config, settings, chunk, disable_bucketing=index > 0)


def _optimizer(ddp: list, means: Means) -> Any:
    config = ddp[0].config
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=0.02,
            weight_decay=0.01,
            # Large, so that the step stays smooth in gradients that are zero but for rounding.
            adam_eps=1e-2,
            clip_grad=0.5,
            bf16=config.bf16,
            fp16=config.fp16,
            params_dtype=config.params_dtype,
            initial_loss_scale=2.0**10,  # the usual 2**32 would skip the first steps
            use_distributed_optimizer=means.distributed_optimizer,
            overlap_param_gather=means.overlap and means.distributed_optimizer,
        ),
        ddp,
        use_gloo_process_groups=False,
    )


def _forward_backward(config: Any, job: Job, ddp: list, optimizer: Any) -> list[tuple[float, int]]:
    for chunk in ddp:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    dp_rank = parallel_state.get_data_parallel_rank()
    mine = global_batch(job)[dp_rank :: parallel_state.get_data_parallel_world_size()]
    iterators = [iter(mine) for _ in ddp]
    store = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=ddp if len(ddp) > 1 else ddp[0],
        num_microbatches=len(mine),
        seq_length=job.sequence_length,
        micro_batch_size=job.micro_batch_size,
        forward_only=False,
    )
    return [(float(total), int(count)) for total, count in store]


def _forward_step(data: Iterator, model: Any) -> tuple[Tensor, Any]:
    tokens, labels, mask, padding = next(data)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    some = padding if padding.any() else None
    output = model(tokens, positions, None, labels=labels, padding_mask=some)

    def loss_of(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, count = (losses * mask).sum(), mask.sum().int()
        return total, count, torch.stack([total.detach(), count.float()])

    return output, loss_of


def _complete_sharded_grads(ddp: list) -> None:
    """With a distributed optimizer a rank holds the sums of its shard only: gather the others."""
    for chunk in ddp:
        for buckets in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            group = buckets.intra_distributed_optimizer_instance_group
            for bucket in buckets.buckets:
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


class _Writer:
    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}

    def add_scalar(self, name: str, value: Any, _iteration: int) -> None:
        self.scalars[name] = float(value)


def logged_losses(
    config: Any, num_micro_batches: int, moe: MoEConfig | None = None
) -> dict[str, float]:
    """Return the MoE losses as Megatron's training loop would log them."""
    kinds = config.moe_router_load_balancing_type
    kinds = [kinds] if isinstance(kinds, str) else kinds
    names = [_LOGGED[kind] for kind in kinds if kind in _LOGGED]
    if config.moe_z_loss_coeff:
        names.append("z_loss")
    if moe is not None:
        names += [loss.log_name for loss in balance_losses(config, moe)]
        if moe.router_choice in ("top_p", "threshold") and moe.target_k >= 0:
            names.append("router_budget_loss")
    writer = _Writer()
    get_moe_metrics_tracker().report(
        loss_scale=1 / num_micro_batches,
        iteration=1,
        writer=writer,
        force_initialize=True,
        track_names=list(dict.fromkeys(names)),
        num_layers=config.num_layers,
        moe_layer_freq=config.moe_layer_freq,
    )
    return writer.scalars
