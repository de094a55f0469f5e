"""The softmax of a router, where torch's own is slow, and what the losses need of it in one pass.

Torch's CPU softmax over a last dimension of fewer than 16 values works value by value: 20 ns each,
ten times what it takes over the other dimension. A token's K weights, and the scores of few
experts, are that narrow.

The balancing losses need the column sums of a softmax over all experts, the z-loss its logarithmic
denominator. Left to autograd that is two exponentials forward, one more backward, and three
gradients of the size of the logits to be added up; here it is one exponential and one gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_NARROW = 16


def softmax(x_TE: Tensor) -> Tensor:
    """Softmax over the last dimension, ``(T, E)``, differentiable."""
    if x_TE.is_cuda or x_TE.shape[-1] >= _NARROW:
        return torch.softmax(x_TE, dim=-1)
    return torch.softmax(x_TE.t().contiguous(), dim=0).t()


def score_sums(
    logits_TE: Tensor, valid_T: Tensor | None = None, num_sequences: int = 1
) -> tuple[Tensor, Tensor]:
    """Sums over tokens of the softmax over experts, and its denominators; differentiable once.

    Args:
        logits_TE: fp32 or fp64; token t is of sequence t mod B.
        valid_T: False for tokens that the sums leave out; None when there is none.
        num_sequences: B.

    Returns:
        sums_BE: Σ of the scores of each sequence's valid tokens, ``(B, E)``.
        logsumexp_T: Of every token, valid or not.

    Cost: holds one ``(T, E)`` for backward.
    """
    return _ScoreSums.apply(logits_TE, valid_T, num_sequences)


class _ScoreSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, valid_T: Tensor | None, num_sequences: int
    ) -> tuple[Tensor, Tensor]:
        scores_TE = softmax(logits_TE)
        # The largest score is at least 1/E: its logarithm is exact to rounding.
        logsumexp_T = logits_TE.amax(dim=-1) - scores_TE.amax(dim=-1).log()
        ctx.save_for_backward(scores_TE, valid_T)
        ctx.num_sequences = num_sequences
        counted_TE = scores_TE if valid_T is None else scores_TE * valid_T.unsqueeze(1)
        return counted_TE.unflatten(0, (-1, num_sequences)).sum(dim=0), logsumexp_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes_BE: Tensor, grad_T: Tensor) -> tuple[Tensor, None, None]:
        """Give scores · (slopes - scores·slopes + grad): both Jacobians, transposed."""
        scores_TE, valid_T = ctx.saved_tensors
        if ctx.num_sequences == 1 and valid_T is None:
            slopes_TE = slopes_BE
            mean_T = scores_TE @ slopes_BE[0]
        else:
            repeats = scores_TE.shape[0] // ctx.num_sequences
            slopes_TE = slopes_BE.repeat(repeats, 1)
            if valid_T is not None:
                slopes_TE *= valid_T.unsqueeze(1)
            mean_T = (scores_TE * slopes_TE).sum(dim=-1)
        return (slopes_TE + (grad_T - mean_T).unsqueeze(1)).mul_(scores_TE), None, None
