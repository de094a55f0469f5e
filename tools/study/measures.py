"""What is read from a router; torch only."""

from __future__ import annotations

from torch import Tensor

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
