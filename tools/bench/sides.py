"""Upstream's MoE layer and ours, with the same weights, in one process.

Imports Megatron: only for processes in which the CPU backend is active.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.mcore.specs import with_moe_layer
from megatron_moe.tools.bench.shapes import NUM_TOKENS, Shape

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of the largest value of each tensor. bf16 carries 8 bits, and a sum of K roundings differs.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def enter_world(rank: int = 0, size: int = 1, port: int = 0) -> None:
    """Join a gloo world in which all ranks are expert-parallel.

    Args:
        rank: This process's place.
        size: Processes, and expert-parallel size.
        port: Where rank 0 listens; only for ``size`` > 1.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    store: dist.Store = dist.HashStore()
    if size > 1:
        store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=size, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(1)


def layer_config(shape: Shape, dtype: str, *, gated: bool, grouped: bool) -> TransformerConfig:
    """Megatron's configuration of one layer, the same for both sides but for ``grouped``.

    The gate runs in fp32 on both sides: in bf16 it would send near-ties to different experts.
    """
    return TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=4,
        num_moe_experts=shape.num_experts,
        moe_router_topk=shape.topk,
        moe_ffn_hidden_size=shape.ffn,
        moe_grouped_gemm=grouped,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1e-2,
        moe_router_dtype="fp32",
        expert_model_parallel_size=dist.get_world_size(),
        gated_linear_unit=gated,
        activation_func=F.silu if gated else F.gelu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
        params_dtype=TORCH_DTYPES[dtype],
        bf16=dtype == "bf16",
    )


def build_layer(config: TransformerConfig, *, ours: bool) -> MegatronMoELayer:
    """Build upstream's layer (always with sequential experts: it has no others here) or ours."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )
    if ours:
        spec = with_moe_layer(spec)
    layer = spec.submodules.mlp(
        config=config, pg_collection=get_default_pg_collection(), is_mtp_layer=False, name=None
    )
    layer.set_layer_number(1)
    return layer.train()


@dataclass(frozen=True, slots=True)
class Sides:
    """Layers with equal weights, and what goes in.

    Args:
        layers: ``upstream``, ``ours`` and, where asked for, ``ours, sequential``.
        x_SBD: Input, ``(T, 1, D)``, a leaf.
        grad_SBD: Gradient that comes from above.
    """

    layers: dict[str, MegatronMoELayer]
    x_SBD: Tensor
    grad_SBD: Tensor

    def step(self, name: str) -> Callable[[], None]:
        """One forward and backward of a side, from cleared gradients."""
        layer = self.layers[name]

        def run() -> None:
            self.clear(name)
            output, _ = layer(self.x_SBD)
            output.backward(self.grad_SBD)

        return run

    def clear(self, name: str) -> None:
        """Forget gradients."""
        self.x_SBD.grad = None
        self.layers[name].zero_grad(set_to_none=True)


def build_sides(shape: Shape, dtype: str, *, gated: bool, sequential: bool) -> Sides:
    """Build all layers of a shape; weights are upstream's."""
    torch.manual_seed(1)
    build: dict[str, Any] = {"shape": shape, "dtype": dtype, "gated": gated}
    layers = {
        "upstream": build_layer(layer_config(**build, grouped=False), ours=False),
        "ours": build_layer(layer_config(**build, grouped=True), ours=True),
    }
    if sequential:
        layers["ours, sequential"] = build_layer(layer_config(**build, grouped=False), ours=True)
    for name, layer in layers.items():
        if name != "upstream":
            layer.load_state_dict(layers["upstream"].state_dict())
    # Rows must differ between ranks, or a wrong exchange could look right.
    torch.manual_seed(2 + dist.get_rank())
    x_SBD = torch.randn(NUM_TOKENS, 1, shape.hidden, dtype=TORCH_DTYPES[dtype]).requires_grad_()
    return Sides(layers, x_SBD, torch.randn_like(x_SBD))


def largest_differences(sides: Sides) -> dict[str, float]:
    """Largest difference of each side to upstream, relative to the largest value of the tensor.

    Compared are the output and the gradients of the input, the router and all expert weights.
    """
    expected = _results(sides, "upstream")
    differences = {}
    for name in sides.layers:
        found = _results(sides, name)
        differences[name] = max(
            ((found[key] - value).abs().max() / value.abs().max()).item()
            for key, value in expected.items()
        )
    del differences["upstream"]
    return differences


def _results(sides: Sides, name: str) -> dict[str, Tensor]:
    sides.clear(name)
    layer = sides.layers[name]
    output, _ = layer(sides.x_SBD)
    output.backward(sides.grad_SBD)
    assert sides.x_SBD.grad is not None
    found = {
        "output": output.detach(),
        "input": sides.x_SBD.grad,
        "router": layer.router.weight.grad,
        **{fc: _weight_gradient(layer.experts, fc) for fc in ("linear_fc1", "linear_fc2")},
    }
    return {key: value.float() for key, value in found.items()}


def _weight_gradient(experts: Any, linear: str) -> Tensor:
    if hasattr(experts, "local_experts"):
        return torch.stack([getattr(e, linear).weight.grad for e in experts.local_experts])
    return getattr(experts, linear).weight.grad
