"""Every back end of the experts with the same weights, in one process.

A step is forward and backward of the experts' stage alone: rows that lie sorted by expert go in,
weighted results come out. Imports Megatron: only for processes in which the plugin is active.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_moe.config import MoEConfig
from megatron_moe.experts.activation import weighted_activation
from megatron_moe.mcore.specs import build_experts
from megatron_moe.tools.bench.experts_case import GROUPED, SEPARATE, TE, UPSTREAM
from megatron_moe.tools.bench.limit import experts_limit
from megatron_moe.tools.bench.shapes import Shape
from megatron_moe.tools.bench.sides import TORCH_DTYPES, layer_config


class Experts:
    """The back ends of one shape and dtype; weights are upstream's.

    Args:
        shape: Sizes.
        dtype: ``fp32`` or ``bf16``.
        device: ``cpu`` or ``cuda``.
        gated: SwiGLU instead of GELU.

    Attributes:
        modules: By name of the side.
        missing: Why a side is not there, by its name.
    """

    def __init__(self, shape: Shape, dtype: str, device: str, *, gated: bool = False) -> None:
        self.shape, self.dtype, self.device = shape, TORCH_DTYPES[dtype], device
        torch.manual_seed(1)
        config = partial(_config, shape, dtype, device, gated=gated)
        self.config = config(grouped=True)
        groups = {"pg_collection": get_default_pg_collection()}
        e = shape.num_experts
        local = get_gpt_layer_local_spec(num_experts=e).submodules.mlp.keywords["submodules"]
        stock = local.experts
        ours = {"submodules": stock.keywords["submodules"], **groups}
        plain = config(grouped=False)
        self.modules: dict[str, Any] = {
            UPSTREAM: stock(e, plain, **groups),
            "sequential": build_experts(e, plain, moe=MoEConfig(), **ours),
        }
        for form in GROUPED:
            moe = MoEConfig(expert_gemm=form)
            self.modules[form] = build_experts(e, self.config, moe=moe, **ours)
        self.missing: dict[str, str] = {}
        if why := why_no_te(device):
            self.missing[TE] = why
        else:
            self.modules[TE] = _te_experts(e, self.config, groups)
        weights = self.modules[UPSTREAM].state_dict()
        for name, module in self.modules.items():
            module.to(device).train()
            if name != UPSTREAM:
                module.load_state_dict(dict(weights), strict=name != TE)
        grouped = self.modules["grouped_mm"]
        self.modules[SEPARATE] = _Separate(
            self.config, grouped.linear_fc1.weight, grouped.linear_fc2.weight
        )

    def workload(self, rows_e: list[int]) -> Workload:
        """Rows for every expert."""
        return Workload(self, rows_e)


class Workload:
    """What goes into all sides, and what comes back.

    Args:
        experts: The sides.
        rows_e: Rows of each expert.
    """

    def __init__(self, experts: Experts, rows_e: list[int]) -> None:
        self.experts, self.rows_e = experts, torch.tensor(rows_e)
        kwargs: dict[str, Any] = {"device": experts.device, "dtype": experts.dtype}
        torch.manual_seed(2)
        self.x_RD = torch.randn(sum(rows_e), experts.shape.hidden, **kwargs).requires_grad_()
        weights = torch.rand(sum(rows_e), device=experts.device, dtype=torch.float32)
        self.probs_R = weights.requires_grad_()
        self.grad_RD = torch.randn_like(self.x_RD)

    def step(self, name: str) -> Callable[[], None]:
        """One forward and backward of a side, from cleared gradients."""
        module = self.experts.modules[name]

        def run() -> None:
            self._clear(module)
            output, _ = module(self.x_RD, self.rows_e, self.probs_R)
            output.backward(self.grad_RD)

        return run

    def limit(self) -> Callable[[], None]:
        """The same matrix products and activation, into place and unrecorded."""
        s, e = self.experts.shape, self.experts
        gated = e.config.gated_linear_unit
        return experts_limit(s.hidden, s.ffn, self.rows_e.tolist(), e.dtype, e.device, gated=gated)

    def differences(self) -> dict[str, float]:
        """Largest difference of each side to upstream, relative to the largest value.

        Compared are the output and the gradients of rows, probabilities and all weights.
        """
        expected = self._results(UPSTREAM)
        worst = {}
        for name in (name for name in self.experts.modules if name != UPSTREAM):
            found = self._results(name)
            worst[name] = max(_difference(found[key], value) for key, value in expected.items())
        return worst

    def _results(self, name: str) -> dict[str, Tensor]:
        module = self.experts.modules[name]
        self._clear(module)
        output, _ = module(self.x_RD, self.rows_e, self.probs_R)
        output.backward(self.grad_RD)
        assert self.x_RD.grad is not None
        assert self.probs_R.grad is not None
        found = {
            "output": output.detach(),
            "rows": self.x_RD.grad,
            "probs": self.probs_R.grad,
            **{fc: _weight_gradient(module, fc) for fc in ("linear_fc1", "linear_fc2")},
        }
        return {key: value.float() for key, value in found.items()}

    def _clear(self, module: Any) -> None:
        self.x_RD.grad = self.probs_R.grad = None
        module.zero_grad(set_to_none=True)


class _Weight(torch.nn.Module):
    def __init__(self, stacked: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(stacked.detach())


class _Separate(torch.nn.Module):
    """One product an expert under plain autograd, the stacked weights unbound."""

    def __init__(self, config: Any, fc1_eFD: Tensor, fc2_eDF: Tensor) -> None:
        super().__init__()
        self.config = config
        self.linear_fc1, self.linear_fc2 = _Weight(fc1_eFD), _Weight(fc2_eDF)

    def forward(self, x_RD: Tensor, rows_e: Tensor, probs_R: Tensor) -> tuple[Tensor, None]:
        c, rows = self.config, rows_e.tolist()
        hidden = separate_products(x_RD, self.linear_fc1.weight, rows)
        act = weighted_activation(hidden, probs_R, c.activation_func, gated=c.gated_linear_unit)
        return separate_products(act, self.linear_fc2.weight, rows), None


def separate_products(x_RD: Tensor, weight_eFD: Tensor, rows_e: list[int]) -> Tensor:
    """Multiply each expert's rows by its weight, unbound from the others'."""
    parts = zip(x_RD.split(rows_e), weight_eFD.unbind(0), strict=True)
    return torch.cat([x @ w.t() for x, w in parts])


def why_no_te(device: str) -> str | None:
    """Why Transformer Engine's grouped experts cannot be built; None if they can."""
    if device != "cuda":
        return "Transformer Engine runs on CUDA only"
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return None if HAVE_TE else "Transformer Engine is not installed"


def _te_experts(num_experts: int, config: TransformerConfig, groups: dict[str, Any]) -> Any:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider().grouped_mlp_modules(True)(num_experts, config, **groups)


def _config(
    shape: Shape, dtype: str, device: str, *, gated: bool, grouped: bool
) -> TransformerConfig:
    config = layer_config(shape, dtype, gated=gated, grouped=grouped)
    config.use_cpu_initialization = device == "cpu"
    return config


def _difference(found: Tensor, expected: Tensor) -> float:
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    # A maximum of several would lose a NaN.
    return difference if difference == difference else float("inf")


def _weight_gradient(module: Any, linear: str) -> Tensor:
    if hasattr(module, "local_experts"):
        found = [getattr(expert, linear).weight.grad for expert in module.local_experts]
    elif (weight := getattr(getattr(module, linear), "weight", None)) is not None:
        return weight.grad
    else:  # Transformer Engine's: weight0, weight1, …
        experts = range(module.num_local_experts)
        found = [getattr(getattr(module, linear), f"weight{i}").grad for i in experts]
    return torch.stack(found)
