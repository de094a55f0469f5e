"""Run one global batch through an MoE layer on this rank; the other half of `faults.py`.

Loss scale, reduction over ranks and the expert bias are Megatron's own: its schedule, its DDP, its
``finalize_model_grads``. Nothing of them is imitated here.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from helpers.faults import Step, StepRecord
from helpers.megatron_world import block_spec_builder, enter_layout, moe_config
from helpers.training_run import logged_losses
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_moe.route import options

_SMALL = {"num_layers": 1, "hidden_size": 8, "moe_ffn_hidden_size": 4, "moe_aux_loss_coeff": 0.0}


class LayerModel(MegatronModule):
    """As much of a model as Megatron's schedule asks for, with MoE layers and nothing else."""

    def __init__(self, config: TransformerConfig, step: Step) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.step = step
        self.layers = torch.nn.ModuleList(
            _build_layer(config, n, i + 1, step) for i, n in enumerate(step.num_experts)
        )
        self.passes = 0
        self.maps: list[Tensor] = []
        for layer in self.layers:
            layer.router.register_forward_hook(self._keep_map)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Asked for by the schedule; there is one stage."""

    def forward(self, hidden: Tensor, padding: Tensor | None) -> Tensor:
        """Run the layers one after another on the same input; sum what they give."""
        if self.step.recompute_noise is not None:
            return tensor_parallel.checkpoint(self._layers, False, hidden, padding)
        runs = [self._layers(hidden, padding) for _ in range(max(self.step.mtp_passes, 1))]
        return torch.stack(runs).sum(0)

    def _layers(self, hidden: Tensor, padding: Tensor | None) -> Tensor:
        self.passes += 1
        if self.step.recompute_noise is not None and self.passes % 2 == 0:
            generator = torch.Generator().manual_seed(11)
            noise = torch.randn(hidden.shape, generator=generator)
            hidden = hidden + self.step.recompute_noise * noise
        return torch.stack([layer(hidden, padding_mask=padding)[0] for layer in self.layers]).sum(0)

    def _keep_map(self, router: Any, inputs: Any, output: Any) -> None:
        routing_map = output[1] if isinstance(output, tuple) else output.dense()[1]
        self.maps.append(routing_map.clone())


def run_step_rank(step: Step) -> StepRecord:
    """Run ``step``; if it may raise, how it ended is the record."""
    try:
        return _run(step)
    except (ValueError, RuntimeError) as error:
        if not step.may_raise:
            raise
        first = str(error).partition("\n")[0]
        return StepRecord(error=f"{type(error).__name__}: {first}")


def _build(step: Step) -> LayerModel:
    config = moe_config(step.layout, **(_SMALL | {"num_moe_experts": 8} | step.model))
    for name, value in step.set_late.items():
        setattr(config, name, value)
    config.finalize_model_grads_func = finalize_model_grads
    return LayerModel(config, step)


def _build_layer(config: Any, num_experts: int, number: int, step: Step) -> Any:
    if num_experts != config.num_moe_experts:
        config = copy(config)
        config.num_moe_experts = num_experts
    layer = (
        block_spec_builder(step.impl)(config, None)
        .layer_specs[0]
        .submodules.mlp(
            config=config,
            pg_collection=get_default_pg_collection(),
            is_mtp_layer=step.mtp_passes > 0,
        )
    )
    assert type(layer).__module__.startswith("megatron_moe") == (step.impl == "plugin")
    layer.set_layer_number(number)
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        layer.router.weight.copy_(torch.eye(num_experts, config.hidden_size))
        if step.expert_bias_E is not None:
            layer.router.expert_bias.copy_(step.expert_bias_E)
    return layer


def _run(step: Step) -> StepRecord:
    places = enter_layout(step.layout)
    with _hearing() as said:
        model = _build(step)
    config = model.config
    wrapped = Float16Module(config, model) if config.bf16 else model
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    ddp = DistributedDataParallel(config, settings, wrapped)
    ddp.zero_grad_buffer()
    before = [_bias(layer) for layer in model.layers]
    mine = _slices(step, parallel_state.get_data_parallel_rank(), places.tp_rank)
    if step.evaluate:
        model.eval()
        for hidden, padding, _ in mine:
            model(hidden, padding)
        model.train()
        config.finalize_model_grads_func([ddp], None)
    else:
        _train(config, step, ddp, mine)
    layers = [layer.router for layer in model.layers]
    return StepRecord(
        maps=model.maps,
        router_grad=layers[0].weight.main_grad.clone(),
        bias_moves=[(_bias(x) - old).sign() for x, old in zip(model.layers, before, strict=True)],
        logged={} if step.mtp_passes else logged_losses(config, len(mine)),
        said=said,
    )


def _bias(layer: Any) -> Tensor:
    bias = layer.router.expert_bias
    return torch.zeros(0) if bias is None else bias.float().clone()


def _slices(step: Step, dp_rank: int, tp_rank: int) -> list[tuple[Tensor, Tensor | None, int]]:
    """This rank's part of each of its micro-batches, with the tokens its loss would count."""
    layout = step.layout
    cp_rank = parallel_state.get_context_parallel_rank()
    dtype = torch.bfloat16 if step.model.get("bf16") else torch.float32
    out = []
    for i, hidden in enumerate(step.hidden[dp_rank]):
        part, parts = cp_rank * layout.tp + tp_rank, layout.tp * layout.cp
        mine = hidden.tensor_split(parts)[part].to(dtype).clone().requires_grad_()
        padding = None
        if step.padding is not None:
            padding = step.padding[dp_rank][i].tensor_split(parts, dim=1)[part].clone()
        counted = step.valid(dp_rank, i).tensor_split(layout.cp)[cp_rank].sum()
        out.append((mine, padding, int(counted)))
    return out


def _train(config: Any, step: Step, ddp: Any, mine: list) -> None:
    generator = torch.Generator().manual_seed(13)

    def forward_step(data: Iterator, model: Any) -> tuple[Tensor, Any]:
        hidden, padding, count = next(data)
        output = model(hidden, padding)
        cotangent = torch.randn(output.shape, generator=generator)

        def loss_of(output: Tensor) -> tuple[Tensor, Tensor, dict]:
            loss = (output * cotangent).sum() if step.main_loss else (output * 0.0).sum()
            return loss, torch.tensor(count, dtype=torch.int), {}

        return output, loss_of

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(mine),
        model=ddp,
        num_microbatches=len(mine),
        seq_length=step.hidden[0][0].shape[0],
        micro_batch_size=step.hidden[0][0].shape[1],
        forward_only=False,
    )


@contextmanager
def _hearing() -> Iterator[list[str]]:
    """Collect every Python warning, and what the plugin's logger and the root logger are told."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(f"{record.name}: {record.getMessage()}")

    options._warned.clear()  # said once a process; this worker may have had such a model before
    ear = Ear(level=logging.WARNING)
    logging.getLogger().addHandler(ear)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
            said.extend(str(w.message).partition("\n")[0] for w in caught)
    finally:
        logging.getLogger().removeHandler(ear)
