"""Torch's own Adam can be resumed from a distributed optimizer's checkpoint, in any layout.

All of it only bites without Apex and Transformer Engine, or when a change of layout turns experts
into ordinary parameters (EP = 1 and ETP = TP) or back.
"""

from collections.abc import Callable
from typing import Any

import torch

from megatron_moe.mcore.patching import Patch


def _set_states(
    original: Callable[..., None], self: Any, model_param: Any, tensors: dict[str, Any]
) -> None:
    # Torch's Adam holds `step` as a tensor; it was loaded with the parameter groups. `tensors` may
    # bring that of the fresh optimizer (`dp_reshardable`), which must not win.
    with torch.no_grad():
        original(self, model_param, tensors | {"step": None})


def _load_one(original: Callable[..., None], self: Any, state_dict: dict) -> None:
    original(self, state_dict)
    for state in self.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _load_chain(original: Callable[..., None], self: Any, state_dict: dict) -> None:
    original(self, _rechained(state_dict, len(self.chained_optimizers)))


def _rechained(state_dict: Any, num_optimizers: int) -> Any:
    """Bring a state dict into the form for ``num_optimizers``, whatever form it was saved in.

    One optimizer reads ``{optimizer, …}``; several read ``{0: {optimizer, …}, 1: …}``. Tensors have
    been put in the form asked for, but the parameter groups come as they were saved.
    """
    if not isinstance(state_dict, dict):
        return state_dict
    saved = [v for k, v in sorted(state_dict.items(), key=str) if isinstance(k, int)]
    top = {k: v for k, v in state_dict.items() if not isinstance(k, int)}
    if num_optimizers == 1 and "optimizer" not in top and saved:
        return saved[0] | top | {"optimizer": _common(saved)}
    if num_optimizers > 1 and "optimizer" in top:
        shared = {k: v for k, v in top.items() if k != "param_state"}
        common = {"optimizer": _common([top])}
        return {i: shared | common | state_dict.get(i, {}) for i in range(num_optimizers)}
    return state_dict


def _common(saved: list[dict]) -> dict[str, Any]:
    """Parameter groups of all saved optimizers, each as a group of experts and of others.

    Megatron looks a group up by its settings, being of experts among them.
    """
    groups = [group for part in saved for group in part["optimizer"]["param_groups"]]
    turned = [group | {"is_expert_parallel": not group["is_expert_parallel"]} for group in groups]
    return saved[0]["optimizer"] | {"param_groups": turned + groups}


PATCHES = (
    Patch(
        target="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
        "._set_main_param_and_optimizer_states",
        wrapper=_set_states,
        reason="in fp32 the main parameter is a view of the model's, which autograd refuses to "
        "overwrite, and torch's Adam has a `step` that the checkpoint keeps elsewhere: no run "
        "with --use-distributed-optimizer could be resumed",
        retire_when="the method runs under torch.no_grad() and leaves `step` alone",
        versions=">=0.19,<0.20",
        fingerprints=("38261637dc92",),
    ),
    Patch(
        target="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.load_state_dict",
        wrapper=_load_one,
        reason="all parameters are given one and the same `step` tensor, which torch's Adam then "
        "advances once for each of them: wrong bias corrections after every resume",
        retire_when="each parameter gets a `step` of its own",
        versions=">=0.19,<0.20",
        fingerprints=("11d0966483bd",),
    ),
    Patch(
        target="megatron.core.optimizer.optimizer.ChainedOptimizer.load_state_dict",
        wrapper=_load_chain,
        reason="with EP = 1 and ETP = TP experts share the optimizer of the other parameters, "
        "else they have their own, and a checkpoint of one form is refused by the other",
        retire_when="fully reshardable checkpoints keep parameter groups apart from optimizers",
        versions=">=0.19,<0.20",
        fingerprints=("a9b12e8e9835",),
    ),
)
