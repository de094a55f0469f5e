"""A distributed optimizer that has not stepped yet has a state to load into."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_moe.mcore.patching import Patch


def _state_dict(original: Callable[[Any], dict], self: Any) -> dict:
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE

    inner = self.optimizer
    if not HAVE_APEX_OR_TE and isinstance(inner, torch.optim.Adam) and not inner.state:
        for group in inner.param_groups:
            for parameter in group["params"]:
                # What Adam's own first step would start from.
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    return original(self)


PATCHES = (
    Patch(
        target="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.state_dict",
        wrapper=_state_dict,
        reason="without Apex and Transformer Engine it asserts that every parameter has made the "
        "same number of steps, so that a new process can load no checkpoint",
        retire_when="a fresh optimizer's step is taken to be 0",
        versions=">=0.19,<0.20",
        fingerprints=("cc2fc62014a9",),
    ),
)
