"""One loss scale for all optimizers of a model.

With expert parallelism Megatron chains two optimizers, each with a dynamic loss scaler of its own,
which grows and backs off by what that optimizer's gradients show. The loss is scaled by the first
one's. Once the experts' gradients alone overflow (one hot expert is enough), the two scales differ
for good, and the experts' gradients are divided by another number than they were multiplied with:
wrong by a power of two, and nothing says so.
"""

from collections.abc import Callable
from typing import Any

from megatron_moe.mcore.patching import Patch


def _prepare_grads(original: Callable[[Any], bool], self: Any) -> bool:
    scalers = [o.grad_scaler for o in self.chained_optimizers if getattr(o, "grad_scaler", None)]
    before = [_copied(scaler.state_dict()) for scaler in scalers]
    found_inf = original(self)
    if found_inf:
        # Each has taken its own step; all take the same one instead.
        for scaler, state in zip(scalers, before, strict=True):
            scaler.load_state_dict(state)
            scaler.update(found_inf)
    return found_inf


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if hasattr(v, "clone") else v for k, v in state.items()}


PATCHES = (
    Patch(
        target="megatron.core.optimizer.optimizer.ChainedOptimizer.prepare_grads",
        wrapper=_prepare_grads,
        reason="with expert parallelism and fp16 the experts' optimizer has a loss scaler of its "
        "own, which drifts from the one that scales the loss: gradients off by powers of two",
        retire_when="chained optimizers share one loss scaler",
        versions=">=0.19,<0.20",
        fingerprints=("3622fe9cf73e",),
    ),
)
