"""Loading the distributed optimizer's state is no step of autograd."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_moe.mcore.patching import Patch


def _without_grad(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        original(*args, **kwargs)


PATCHES = (
    Patch(
        target="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
        "._set_main_param_and_optimizer_states",
        wrapper=_without_grad,
        reason="in fp32 the main parameter is a view of the model's, which autograd refuses to "
        "overwrite: no run with --use-distributed-optimizer could be resumed",
        retire_when="the method runs under torch.no_grad()",
        versions=">=0.19,<0.20",
        fingerprints=("38261637dc92",),
    ),
)
