"""Flat buffers of Megatron's distributed optimizer: where each parameter lies in them.

Parameters of a model chunk are laid out in reverse registration order, each starting on a multiple
of 64 elements. A bucket closes when it has grown to the bucket size, and around an embedding shared
by two pipeline stages. What is saved leaves out the padding at a bucket's end.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm, prod

from megatron_moe.tools.checkpoint.model.arrays import Array
from megatron_moe.tools.checkpoint.model.atoms import MASTER, MOMENT1, MOMENT2

_START = 64
# States of a flat buffer as Megatron names them, with their roles.
STATES = {"param": MASTER, MOMENT1: MOMENT1, MOMENT2: MOMENT2}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a rank.

    Args:
        key: In the module's state dict.
        array: What it is made of.
        expert: Whether it belongs to the expert optimizer, where there is one.
        decay: Whether weight decay applies: neither 1-D nor a bias.
        shared: Embedding held by two pipeline stages: a bucket of its own.
    """

    key: str
    array: Array
    expert: bool
    decay: bool
    shared: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.array.shape)


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket: its parameters with their first element, and its length without end padding."""

    starts: tuple[tuple[Parameter, int], ...]
    numel: int


def _aligned(position: int) -> int:
    return -(-position // _START) * _START


def cut(parameters: list[Parameter], bucket_size: int | None, dp: int = 1) -> list[Bucket]:
    """Lay parameters out by the rule.

    Args:
        parameters: In registration order.
        bucket_size: Elements at which a bucket closes; None for a single one.
        dp: Ranks over which the buffer is cut; it decides where padding starts.
    """
    buckets: list[Bucket] = []
    starts: list[tuple[Parameter, int]] = []
    end = 0
    for parameter in reversed(parameters):
        at = _aligned(end)
        if parameter.shared and starts:
            # Megatron counts the gap behind the last parameter, unless the bucket is padded.
            buckets.append(Bucket(tuple(starts), at if at == padded(at, dp) else end))
            starts, at = [], 0
        starts.append((parameter, at))
        end = at + parameter.numel
        if parameter.shared or (bucket_size is not None and end >= bucket_size):
            buckets.append(Bucket(tuple(starts), end))
            starts, end = [], 0
    if starts:
        buckets.append(Bucket(tuple(starts), end))
    return buckets


def cut_by_lengths(parameters: list[Parameter], lengths: list[int]) -> list[Bucket] | str:
    """Lay parameters out so that buckets have the given lengths, which were saved.

    Returns:
        Buckets, or why it cannot be.
    """
    buckets: list[Bucket] = []
    starts: list[tuple[Parameter, int]] = []
    end = 0
    for parameter in reversed(parameters):
        at = _aligned(end)
        if starts and parameter.shared and lengths[len(buckets)] in (at, end):
            buckets.append(Bucket(tuple(starts), lengths[len(buckets)]))
            starts, at = [], 0
        if len(buckets) == len(lengths):
            return f"{parameter.key} and others lie behind the last of {len(lengths)} buckets"
        starts.append((parameter, at))
        end = at + parameter.numel
        length = lengths[len(buckets)]
        if end > length:
            where = f"element {end} of bucket {len(buckets)}"
            return f"{parameter.key} ends at {where}, which has {length}"
        # A gap may follow before a shared embedding; then the bucket closes there.
        if end == length:
            buckets.append(Bucket(tuple(starts), end))
            starts, end = [], 0
    if starts or len(buckets) != len(lengths):
        return f"the parameters end at element {end} of bucket {len(buckets)} of {len(lengths)}"
    return buckets


def padded(numel: int, dp: int, high_bandwidth: bool = False) -> int:
    """Return a bucket's length with its end padding."""
    multiple = lcm(dp, 128, 2**16) if high_bandwidth else lcm(dp, 128)
    return -(-numel // multiple) * multiple


def default_bucket_size(dp: int) -> int:
    """Return Megatron's bucket size when gradients are reduced during the backward pass."""
    return max(40_000_000, 1_000_000 * dp)
