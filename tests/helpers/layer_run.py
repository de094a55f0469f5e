"""Run one MoE layer on this rank; the other half of `layers.py`, imports Megatron."""

from typing import Any

import torch
from helpers.canonical import load_canonical, pieces_of
from helpers.layers import LayerJob, LayerRecord
from helpers.layout import Layout
from helpers.megatron_world import block_spec_builder, enter_layout, moe_config
from helpers.training_run import logged_losses
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection
from torch import Tensor

from megatron_moe.mcore.finish import end_batch


def run_layer_rank(job: LayerJob, layout: Layout) -> LayerRecord:
    """Build the layer with canonical weights, run it on this rank's slice, forward and back."""
    places = enter_layout(layout)
    config = moe_config(layout, **({"num_layers": 1, "params_dtype": job.dtype} | job.model))
    spec = block_spec_builder(job.impl, job.moe)(config, None).layer_specs[0]
    layer = spec.submodules.mlp(config=config, pg_collection=get_default_pg_collection())
    assert type(layer).__module__.startswith("megatron_moe") == (job.impl == "plugin")
    layer.set_layer_number(1)
    layer.train(job.training)
    seen = _watch(layer.router)
    gated = config.gated_linear_unit
    load_canonical([layer], places, gated=gated, empty_experts=job.empty_experts)
    # What the schedule would set; with 1, the ranks' gradients sum to those of the whole.
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    dp_rank = parallel_state.get_data_parallel_rank()
    part = parallel_state.get_context_parallel_rank() * layout.tp + places.tp_rank
    hidden = _slice(job.batches[dp_rank], part, layout).requires_grad_()
    padding = None
    if job.padding is not None:
        padding = _slice(job.padding[dp_rank].t(), part, layout).t()
    output, bias = layer(hidden, padding_mask=padding)
    assert bias is None
    output.backward(_slice(job.cotangents[dp_rank], part, layout))
    if job.impl == "plugin" and job.training:
        end_batch([layer.router])
    return LayerRecord(
        dp_rank=dp_rank,
        part=part,
        output=output.detach(),
        input_grad=hidden.grad,
        grads=pieces_of([layer], places, _grad_of, gated=gated),
        logged=logged_losses(config, num_micro_batches=1, moe=job.moe),
        routing_map=seen[0].view(*hidden.shape[:2], config.num_moe_experts),
        # Upstream's counts are a rank's own until its optimizer step.
        state={name: value.clone() for name, value in layer.router.named_buffers()}
        if job.impl == "plugin"
        else {},
    )


def _watch(router: torch.nn.Module) -> list[Tensor]:
    """Collect the routing maps ``(T, E)`` that a router of either make gives."""
    seen: list[Tensor] = []

    def note(_module: object, _args: object, output: Any) -> None:
        seen.append((output[1] if isinstance(output, tuple) else output.dense()[1]).detach())

    router.register_forward_hook(note)
    return seen


def _slice(whole: Tensor, part: int, layout: Layout) -> Tensor:
    """This rank's slice of the sequence, dimension 0."""
    return whole.tensor_split(layout.tp * layout.cp)[part].clone()


def _grad_of(parameter: Tensor) -> Tensor:
    # No gradient at all would stall Megatron's overlapped reduction: it must be zero, not None.
    assert parameter.grad is not None, "a parameter took no part in autograd"
    return parameter.grad
