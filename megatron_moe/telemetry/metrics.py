"""Figures of a load: how uneven it is, and how many experts are idle."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def load_cv(load_E: Tensor) -> float:
    """Coefficient of variation, std / mean: 0 when balanced, √(E - 1) when one takes all."""
    load_E = load_E.double()
    mean = float(load_E.mean())
    return float(load_E.std(correction=0)) / mean if mean else 0.0


def load_entropy(load_E: Tensor) -> float:
    """Entropy of the shares over its maximum log E: 1 when balanced, 0 when one takes all."""
    if load_E.numel() == 1:
        return 1.0
    return 1.0 - load_kl(load_E) / math.log(load_E.numel())


def load_kl(load_E: Tensor) -> float:
    """KL divergence of the shares from the uniform ones, in nats: 0 when balanced, at most log E.

    The count-based companion of the ``kl`` balancing loss: it says what was chosen, the loss what
    the scores say.
    """
    total = float(load_E.sum())
    if not total:
        return 0.0
    shares_E = load_E.double() / total
    return float(torch.special.xlogy(shares_E, shares_E * load_E.numel()).sum())


def dead_experts(load_E: Tensor) -> int:
    """Experts that nobody chose."""
    return int((load_E == 0).sum())
