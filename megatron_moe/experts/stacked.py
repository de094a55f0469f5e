"""One linear layer of all experts of a rank, in one stacked weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_moe.config import MoEConfig
from megatron_moe.experts.fp8 import emulation_of
from megatron_moe.experts.fp8_delayed import DelayedScales, load_scales
from megatron_moe.experts.grouped_gemm import choose_form, grouped_linear
from megatron_moe.experts.offload import ExpertOffload
from megatron_moe.experts.sparse import Sparsity, check_inputs, load_mask


class StackedLinear(torch.nn.Module):
    """One linear layer of e experts: ``weight`` ``(e, out, in)`` and ``bias`` ``(e, out)``.

    In a plain state dict each expert has its own key (``weight0``, ``weight1``, …), the names of
    Transformer Engine's grouped linear, so that checkpoints go both ways.

    Args:
        num_local_experts: e.
        shape: ``(out, in)`` of one expert, this rank's slice.
        config: Megatron's.
        moe: The plugin's options.
        shard_dim: The dimension of one expert cut over ETP: 0 (columns) or 1 (rows).
        ordinary: Whether data-parallel ranks hold the same experts as they hold the rest.
    """

    mask: Tensor | None

    def __init__(
        self,
        num_local_experts: int,
        shape: tuple[int, int],
        config: TransformerConfig,
        *,
        moe: MoEConfig,
        shard_dim: int,
        ordinary: bool,
    ) -> None:
        super().__init__()
        device = torch.device("cpu" if config.use_cpu_initialization else "cuda")
        kwargs = {"device": device, "dtype": config.params_dtype}
        self.offload = ExpertOffload.shared(moe)
        if self.offload is None:
            weight = torch.empty(num_local_experts, *shape, **kwargs)
        else:
            weight = self.offload.store.zeros((num_local_experts, *shape), config.params_dtype)
        self.weight = torch.nn.Parameter(weight)
        self.bias: torch.nn.Parameter | None = None
        stride = 2 if config.gated_linear_unit and shard_dim == 0 else 1
        if config.add_bias_linear:
            self.bias = torch.nn.Parameter(torch.zeros(num_local_experts, shape[0], **kwargs))
        for name, parameter in self.named_parameters():
            sharded = shard_dim == 0 or name == "weight"
            dim = 1 + shard_dim if sharded else -1
            set_tensor_model_parallel_attributes(parameter, sharded, dim, stride)
            parameter.allreduce = ordinary  # type: ignore[attr-defined]  # Megatron's mark
        self.sparsity: Sparsity | None = None
        self.register_buffer("mask", None)
        if moe.sparse_experts != "none":
            check_inputs(shape[1], "the inputs of an expert's linear layer on one rank")
            self.sparsity = Sparsity(moe)
            self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool))
        self.gemm, self.tf32 = moe.expert_gemm, moe.expert_tf32
        self.emulation = emulation_of(config, moe, num_local_experts, device)

    def forward(
        self,
        x: Tensor | tuple[Tensor | None, ...],
        rows_e: Sequence[int],
        before: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Multiply each expert's rows by its weight; the bias is not added.

        To be called as a module: Megatron waits for gathered weights in the hooks of the call.

        Args:
            x: Rows by expert, ``(R, in)``; with ``before``, its arguments.
            rows_e: Rows of each expert.
            before: Makes the rows from what is kept for backward, again in backward.

        Returns:
            ``(R, out)``.
        """
        if self.offload is not None:
            return self.offload.product(self, x, rows_e, before)
        dtype = self.weight.dtype if self.emulation is None else torch.float32
        form = choose_form(self.gemm, self.weight.device, dtype, self.weight, rows_e)
        weight: Tensor = self.weight
        if self.sparsity is not None and self.mask is not None:
            weight = self.sparsity.effective(weight, self.mask)
        return grouped_linear(
            x, weight, rows_e, form, before=before, emulation=self.emulation, tf32=self.tf32
        )

    def saved_state(self) -> dict[str, Tensor]:
        """What is saved beside the parameters, by name: ``(e, …)``, one entry an expert.

        The mask of sparse weights, and what delayed scaling remembers.
        """
        state = {} if self.fp8_scales is None else self.fp8_scales.kept()
        if self.sparsity is not None and self.mask is not None:
            self.sparsity.refresh(self.weight, self.mask)
            state["mask"] = self.mask
        return state

    @property
    def fp8_scales(self) -> DelayedScales | None:
        """The state of emulated delayed scaling; mostly None."""
        return None if self.emulation is None else self.emulation.scales

    def bias_of_rows(self, rows_e: Sequence[int]) -> Tensor | None:
        """Each row's bias, ``(R, out)``; None without a bias."""
        if self.bias is None:
            return None
        rows = torch.tensor(rows_e, device=self.bias.device)
        return self.bias.repeat_interleave(rows, dim=0, output_size=sum(rows_e))

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        for name, parameter in self.named_parameters():
            for i, one in enumerate(parameter.unbind(0)):
                destination[f"{prefix}{name}{i}"] = one if keep_vars else one.detach()
        for name, stack in self.saved_state().items():
            destination |= {f"{prefix}{name}{i}": one for i, one in enumerate(stack.unbind(0))}

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        load_mask(self, state_dict, prefix, error_msgs)
        load_scales(self.fp8_scales, state_dict, prefix, error_msgs)
        if self.offload is not None:
            self.offload.end_batch()
        expected: set[str] = set()
        for name, parameter in self.named_parameters():
            targets = {f"{prefix}{name}{i}": one for i, one in enumerate(parameter.data.unbind(0))}
            if f"{prefix}{name}" in state_dict:  # a distributed checkpoint: stacked already
                targets = {f"{prefix}{name}": parameter.data}
            expected |= targets.keys()
            for key, target in targets.items():
                found = state_dict.get(key)
                if found is None:
                    missing_keys.append(key)
                elif found.shape != target.shape:
                    error_msgs.append(
                        f"size mismatch for {key}: {tuple(found.shape)} in the checkpoint, "
                        f"{tuple(target.shape)} in the model"
                    )
                else:
                    target.copy_(found)
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in expected]
