"""The K best experts of each token.

On a CPU torch's ``topk`` partitions each row with pairs of a value and a place, one row after
another. Packing both into one integer makes the best of a row a plain maximum, which runs over
vectors: three to four times as fast for 8 choices at the widths of real models, and never slower.
On a tie the earlier expert wins.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Keys of a block of tokens (4 MiB) stay in the cache while K maxima are taken of them; with smaller
# blocks the starting of so many operations costs more than the cache saves.
_KEYS_PER_BLOCK = 2**19
# Below every key: int32 values shifted left by 16 reach no further than -2**47.
_TAKEN = -(2**62)


def best_experts(ranked_TE: Tensor, topk: int) -> Tensor:
    """Choose the largest of each row.

    Args:
        ranked_TE: Values to rank by, ``(T, E)``, without gradient.
        topk: K.

    Returns:
        ``(T, K)`` int64, best first.
    """
    num_experts = ranked_TE.shape[1]
    if ranked_TE.is_cuda or ranked_TE.dtype != torch.float32 or num_experts > 2**16:
        return ranked_TE.topk(topk, dim=-1).indices
    blocks = ranked_TE.split(max(1, _KEYS_PER_BLOCK // num_experts))
    return torch.cat([_by_keys(block, topk) for block in blocks])


def _by_keys(ranked_TE: Tensor, topk: int) -> Tensor:
    """Take K maxima of (value, -place) packed in int64."""
    last = ranked_TE.shape[1] - 1
    bits_TE = ranked_TE.contiguous().view(torch.int32)
    # Floats order like integers once the magnitude bits of negative ones are flipped. In place:
    # building the keys is a third of the time, and fresh memory would double it.
    order_TE = (bits_TE >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits_TE)
    places_E = torch.arange(last, -1, -1, device=ranked_TE.device)
    keys_TE = order_TE.to(torch.int64).bitwise_left_shift_(16).bitwise_or_(places_E)
    chosen = [keys_TE.amax(dim=1, keepdim=True)]
    for _ in range(topk - 1):
        keys_TE.scatter_(1, last - (chosen[-1] & 0xFFFF), _TAKEN)
        chosen.append(keys_TE.amax(dim=1, keepdim=True))
    return last - (torch.cat(chosen, dim=1) & 0xFFFF)
