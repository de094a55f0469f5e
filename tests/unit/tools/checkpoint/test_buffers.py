"""Flat buffers: where parameters start, and where buckets end."""

from megatron_moe.tools.checkpoint.model.arrays import Array
from megatron_moe.tools.checkpoint.model.buffers import (
    Parameter,
    cut,
    cut_by_lengths,
    default_bucket_size,
    padded,
)


def parameters(*sizes: int, shared: int | None = None) -> list[Parameter]:
    return [
        Parameter(f"p{i}", Array(f"p{i}", (n,)), False, True, i == shared)
        for i, n in enumerate(sizes)
    ]


def shown(buckets) -> list[tuple[dict[str, int], int]]:
    return [({p.key: start for p, start in b.starts}, b.numel) for b in buckets]


def test_the_last_registered_comes_first_each_on_a_multiple_of_64():
    assert shown(cut(parameters(10, 100, 64), None)) == [({"p2": 0, "p1": 64, "p0": 192}, 202)]


def test_a_bucket_closes_when_it_has_grown_to_its_size():
    assert shown(cut(parameters(10, 100, 64, 70), 100)) == [
        ({"p3": 0, "p2": 128}, 192),
        ({"p1": 0}, 100),
        ({"p0": 0}, 10),
    ]


def test_a_shared_embedding_has_a_bucket_of_its_own():
    # The bucket before it ends where it would have started.
    assert shown(cut(parameters(10, 100, 70, shared=1), None)) == [
        ({"p2": 0}, 128),
        ({"p1": 0}, 100),
        ({"p0": 0}, 10),
    ]
    assert shown(cut(parameters(10, 100, shared=1), None)) == [({"p1": 0}, 100), ({"p0": 0}, 10)]


def test_lengths_that_do_not_fit_are_explained():
    mine = parameters(10, 100, 64)
    assert cut_by_lengths(mine, [100]) == "p1 ends at element 164 of bucket 0, which has 100"
    assert cut_by_lengths(mine, [300]) == "the parameters end at element 202 of bucket 0 of 1"
    assert cut_by_lengths(mine, [164]) == "p0 and others lie behind the last of 1 buckets"
    assert cut_by_lengths(mine, [202, 5]) == "the parameters end at element 0 of bucket 1 of 2"
    assert cut_by_lengths(mine, []) == "p2 and others lie behind the last of 0 buckets"


def test_end_padding():
    assert padded(1, 1) == 128
    assert padded(128, 2) == 128
    assert padded(129, 3) == 384
    assert padded(1, 256) == 256
    assert padded(1, 1, high_bandwidth=True) == 65536
    assert padded(65537, 3, high_bandwidth=True) == 196608


def test_default_bucket_size():
    assert default_bucket_size(8) == 40_000_000
    assert default_bucket_size(64) == 64_000_000
