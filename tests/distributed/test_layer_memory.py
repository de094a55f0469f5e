"""What a pass through the layer leaves in memory, exactly, with expert parallelism."""

import time
from dataclasses import dataclass
from typing import Any

import pytest
from helpers.layout import Layout

from megatron_moe.config import MoEConfig

SELECTIVE = {"recompute_granularity": "selective"}


@dataclass(frozen=True, kw_only=True)
class Left:
    """Bytes that a forward pass leaves alive, without its output; and after backward.

    ``rows`` is the size of what was dispatched to this rank.
    """

    by_forward: int
    by_backward: int
    rows: int


def left_by(world: Any, model: dict[str, Any], moe: MoEConfig, gradients: bool = True) -> Left:
    import torch
    from helpers.megatron_world import block_spec_builder, enter_layout, moe_config
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_moe.tools.bench.live_bytes import LiveBytes

    layout = Layout(ep=2)
    enter_layout(layout)
    sizes = {"num_layers": 1, "hidden_size": 128, "moe_ffn_hidden_size": 256}
    config = moe_config(layout, moe_grouped_gemm=True, **sizes, **model)
    spec = block_spec_builder("plugin", moe)(config, None).layer_specs[0]
    layer = spec.submodules.mlp(config=config, pg_collection=get_default_pg_collection())
    layer.set_layer_number(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.grad = torch.zeros_like(parameter)  # what backward adds to is there before
    rows = []
    layer.experts.register_forward_pre_hook(lambda _, args: rows.append(args[0].nbytes))
    hidden = torch.randn(64, 4, config.hidden_size, requires_grad=gradients)
    hidden.grad = torch.zeros_like(hidden)
    with LiveBytes() as bytes_, torch.set_grad_enabled(gradients):
        output, _ = layer(hidden)
        by_forward = _settled(bytes_) - output.nbytes
        if gradients:
            output.backward(torch.ones_like(output))
        del output
        by_backward = _settled(bytes_)
    return Left(by_forward=by_forward, by_backward=by_backward, rows=rows[0])


def _settled(bytes_: Any) -> int:
    """Bytes alive once gloo's threads have let go of what they sent, which takes them a moment."""
    least = bytes_.live
    for _ in range(100):
        time.sleep(0.005)
        least = min(least, bytes_.live)
    return least


SMALL = 50_000  # the decision and the plan: some 60 bytes for each copy of a token


def test_nothing_outlives_a_pass_without_gradients(pool):
    for left in pool.run(left_by, {}, MoEConfig(), False, world_size=2):
        assert left.rows > 5 * SMALL
        assert left.by_forward == 0


@pytest.mark.parametrize(
    ("model", "moe", "at_most"),
    [
        ({}, MoEConfig(), None),
        (SELECTIVE | {"recompute_modules": ["moe_act"]}, MoEConfig(), None),
        ({}, MoEConfig(recompute_experts=True), 1.0),
        (SELECTIVE | {"recompute_modules": ["moe"]}, MoEConfig(), 0.0),
    ],
    ids=["nothing", "activation", "experts", "layer"],
)
def test_what_is_kept_for_backward(pool, model, moe, at_most):
    """In units of the dispatched rows: dispatch buffers are gone once combine is through."""
    plain = pool.run(left_by, {}, MoEConfig(), world_size=2)
    for left, without in zip(pool.run(left_by, model, moe, world_size=2), plain, strict=True):
        assert left.by_backward < SMALL
        if at_most is not None:
            assert left.by_forward <= at_most * left.rows + SMALL
        elif model:
            assert left.by_forward < without.by_forward - left.rows
        else:
            assert left.by_forward > 4 * left.rows
