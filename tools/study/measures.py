"""What is read from a router, and from what a training holds in memory; torch only."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor, nn

from megatron_moe.telemetry.metrics import load_cv, load_entropy


def churn(before_TE: Tensor, now_TE: Tensor) -> float:
    """Share of choices that differ between two decisions on the same tokens.

    Choices in one of the two only, over all choices of both: with K choices a token in both, the
    share of the K that changed. 0 when nobody chose anything.
    """
    differing = int((before_TE ^ now_TE).sum())
    return differing / max(1, int(before_TE.sum()) + int(now_TE.sum()))


class LoadMeter:
    """Means over steps and layers of how even the load of each single step is."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._cvs: list[float] = []
        self._entropies: list[float] = []
        self._choices = self._dropped = self._tokens = 0

    def add(self, load_E: Tensor, dropped_E: Tensor, num_tokens: int) -> None:
        """Take in one layer's step.

        Args:
            load_E: Choices of each expert before capacity, ``(E,)`` int64.
            dropped_E: Of these, given up by capacity, ``(E,)``.
            num_tokens: Tokens that chose.
        """
        self._cvs.append(float(load_cv(load_E)))
        self._entropies.append(float(load_entropy(load_E)))
        self._choices += int(load_E.sum())
        self._dropped += int(dropped_E.sum())
        self._tokens += num_tokens

    def means(self) -> dict[str, float]:
        """``cv``, ``variance``, ``entropy``, ``drop_rate`` and ``mean_k`` since the reset."""
        return {
            "cv": sum(self._cvs) / len(self._cvs),
            "variance": sum(cv * cv for cv in self._cvs) / len(self._cvs),
            "entropy": sum(self._entropies) / len(self._entropies),
            "drop_rate": self._dropped / max(1, self._choices),
            "mean_k": self._choices / max(1, self._tokens),
        }


def state_bytes(model: nn.Module, optimizer: Any) -> float:
    """Bytes a parameter that stay from update to update, counted on the tensors themselves.

    Weights and buffers (masks are some), gradients, the optimizer's fp32 copies and its state;
    a storage that several tensors share counts once.

    Args:
        model: Whose parameters have ``main_grad`` or ``grad``.
        optimizer: Megatron's, chained or not, after an update.
    """
    parameters = list(model.parameters())
    tensors: list[Tensor | None] = [*parameters, *model.buffers()]
    tensors += [getattr(p, "main_grad", None) for p in parameters]
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        stepped = [p for group in one.optimizer.param_groups for p in group["params"]]
        states = (state.values() for state in one.optimizer.state.values())
        tensors += stepped
        tensors += [v for v in itertools.chain(*states) if isinstance(v, Tensor)]
        parameters += stepped
    tensors += [p.grad for p in parameters]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t is not None
    }
    held = sum(storage.nbytes() for storage in storages.values())
    return held / sum(p.numel() for p in model.parameters())
