"""Hypothesis strategies for the cases in which mixture-of-experts code breaks.

Always in reach: an expert without tokens, a rank without tokens, uneven batches, K = 1, K = E,
as many experts as ranks, parallel axes of different sizes.
"""

from dataclasses import dataclass

import torch
from helpers.layout import Layout, legal_layouts
from hypothesis import strategies as st
from torch import Tensor

SEEDS = st.integers(0, 2**31 - 1)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class RoutingCase:
    """A decision without a router.

    Args:
        indices_TK: Distinct experts of each token, ``(T, K)`` int64.
        probs_TK: Positive weights, fp64, ``(T, K)``.
        num_experts: E.
        kept_TK: False where a choice is not carried out, ``(T, K)``; None when all are.
    """

    indices_TK: Tensor
    probs_TK: Tensor
    num_experts: int
    kept_TK: Tensor | None

    @property
    def routing_map(self) -> Tensor:
        """Choices carried out, ``(T, E)`` bool."""
        kept = torch.ones_like(self.indices_TK, dtype=torch.bool)
        kept = kept if self.kept_TK is None else self.kept_TK
        shape = (self.indices_TK.shape[0], self.num_experts)
        return torch.zeros(shape, dtype=torch.bool).scatter(1, self.indices_TK, kept)


@st.composite
def routings(
    draw: st.DrawFn,
    *,
    max_tokens: int = 9,
    num_experts: int | None = None,
    topk: int | None = None,
    drops: bool = True,
) -> RoutingCase:
    """Draw a decision: any T from 0, some experts favoured, some never chosen.

    Args:
        draw: Hypothesis's.
        max_tokens: Largest T.
        num_experts: E; drawn if None.
        topk: K; drawn if None.
        drops: Whether some choices may be marked as not carried out.
    """
    experts = draw(st.integers(1, 8)) if num_experts is None else num_experts
    k = draw(st.integers(1, experts)) if topk is None else topk
    tokens = draw(st.integers(0, max_tokens))
    generator = _generator(draw(SEEDS))
    scores = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    # Few favourites leave the other experts empty as soon as K experts remain.
    favoured = draw(st.integers(min_value=k, max_value=experts))
    scores[:, favoured:] -= 2.0
    order = torch.randperm(experts, generator=generator)
    indices = order[scores.topk(k, dim=1).indices]
    probs = torch.rand(tokens, k, generator=generator, dtype=torch.float64) + 0.01
    kept = None
    if drops and draw(st.booleans()):
        kept = torch.rand(tokens, k, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9]))
    return RoutingCase(indices, probs, experts, kept)


def uneven_lengths(
    count: int, *, multiple: int = 1, max_parts: int = 2
) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw a sequence length for each of ``count`` ranks: uneven, and sometimes 0.

    Args:
        count: Data-parallel ranks.
        multiple: What each length is a multiple of (the ranks that share a sequence).
        max_parts: Largest length, in multiples.
    """
    one = st.integers(0, max_parts).map(lambda parts: parts * multiple)
    return st.lists(one, min_size=count, max_size=count).map(tuple)


def layouts(world_size: int, num_experts: int = 4) -> st.SearchStrategy[Layout]:
    """Draw a legal layout, the simplest first."""
    return st.sampled_from(legal_layouts(world_size, num_experts))
