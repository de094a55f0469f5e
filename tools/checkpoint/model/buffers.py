"""Flat buffers of Megatron's distributed optimizer: where each parameter lies in them.

Parameters of a model chunk are laid out in reverse registration order, each starting on a multiple
of 64 elements. A bucket closes when it has grown to the bucket size, and around an embedding shared
by two pipeline stages. What is saved leaves out the padding at a bucket's end.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm, prod

from megatron_moe.tools.checkpoint.model.arrays import Array

_START = 64


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


def cut(parameters: list[Parameter], bucket_size: int | None) -> list[Bucket]:
    """Lay parameters out by the rule.

    Args:
        parameters: In registration order.
        bucket_size: Elements at which a bucket closes; None for a single one.
    """
    buckets: list[Bucket] = []
    starts: list[tuple[Parameter, int]] = []
    at = 0
    for parameter in reversed(parameters):
        at = _aligned(at)
        if parameter.shared and starts:
            buckets.append(Bucket(tuple(starts), at))
            starts, at = [], 0
        starts.append((parameter, at))
        at += parameter.numel
        if parameter.shared or (bucket_size is not None and at >= bucket_size):
            buckets.append(Bucket(tuple(starts), at))
            starts, at = [], 0
    if starts:
        buckets.append(Bucket(tuple(starts), at))
    return buckets


def cut_by_lengths(parameters: list[Parameter], lengths: list[int]) -> list[Bucket] | str:
    """Lay parameters out so that buckets have the given lengths, which were saved.

    Returns:
        Buckets, or why it cannot be.
    """
    buckets: list[Bucket] = []
    starts: list[tuple[Parameter, int]] = []
    at = 0
    for parameter in reversed(parameters):
        at = _aligned(at)
        if starts and parameter.shared and at == lengths[len(buckets)]:
            buckets.append(Bucket(tuple(starts), at))
            starts, at = [], 0
        if len(buckets) == len(lengths):
            return f"{parameter.key} and others lie behind the last of {len(lengths)} buckets"
        starts.append((parameter, at))
        at += parameter.numel
        if at > lengths[len(buckets)]:
            return (
                f"{parameter.key} ends at element {at} of bucket {len(buckets)}, which has "
                f"{lengths[len(buckets)]}"
            )
        if at == lengths[len(buckets)]:
            buckets.append(Bucket(tuple(starts), at))
            starts, at = [], 0
    if starts or len(buckets) != len(lengths):
        return f"the parameters end at element {at} of bucket {len(buckets)} of {len(lengths)}"
    return buckets


def padded(numel: int, dp: int, high_bandwidth: bool = False) -> int:
    """Return a bucket's length with its end padding."""
    multiple = lcm(dp, 128, 2**16) if high_bandwidth else lcm(dp, 128)
    return -(-numel // multiple) * multiple


def default_bucket_size(dp: int) -> int:
    """Return Megatron's bucket size when gradients are reduced during the backward pass."""
    return max(40_000_000, 1_000_000 * dp)
