"""The cache of experts: what it holds, in what order it forgets, and what it copies ahead."""

from functools import partial
from threading import Event, Timer

import pytest
import torch

from megatron_moe.experts.expert_cache import ExpertCache

ONE = 4 * 16  # bytes of one matrix


class Matrices:
    """Numbered matrices, and which of them were copied."""

    def __init__(self, count: int) -> None:
        self.values = torch.arange(count * 16, dtype=torch.float32).view(count, 4, 4)
        self.copied: list[int] = []

    def key(self, i: int) -> tuple:
        return i, partial(self._read, i)

    def _read(self, i: int) -> torch.Tensor:
        self.copied.append(i)
        return self.values[i]

    def plan(self, cache: ExpertCache, *order: int) -> None:
        cache.plan([self.key(i) for i in order])

    def fetch(self, cache: ExpertCache, *order: int) -> None:
        for i in order:
            assert torch.equal(cache.fetch(*self.key(i)), self.values[i])


def held(cache: ExpertCache) -> list[int]:
    """Keys, least recently used first."""
    return list(cache._entries)


def test_a_copy_is_used_again_and_does_not_follow_its_source():
    matrices, cache = Matrices(2), ExpertCache(2 * ONE)
    first = cache.fetch(*matrices.key(0))
    matrices.values[0] += 1
    assert cache.fetch(*matrices.key(0)) is first
    assert not torch.equal(first, matrices.values[0])
    assert cache.summary()["hits"] == 1 and cache.summary()["misses"] == 1


def test_the_least_recently_used_goes_first():
    matrices, cache = Matrices(5), ExpertCache(3 * ONE)
    matrices.fetch(cache, 0, 1, 2, 0, 3)
    assert held(cache) == [2, 0, 3]
    matrices.fetch(cache, 4)
    assert held(cache) == [0, 3, 4]
    assert cache.summary()["evicted"] == 2 and cache.summary()["held_bytes"] == 3 * ONE


def test_room_for_one_serves_any_order():
    matrices, cache = Matrices(4), ExpertCache(ONE)
    matrices.plan(cache, 0, 1, 2, 3)
    matrices.fetch(cache, 0, 1, 2, 3)
    assert held(cache) == [3]
    assert cache.summary()["prefetched_bytes"] == 0


def test_a_matrix_larger_than_the_capacity_is_held_alone():
    matrices, cache = Matrices(2), ExpertCache(ONE - 1)
    matrices.fetch(cache, 0, 1, 1)
    assert held(cache) == [1] and cache.summary()["hits"] == 1


def test_what_comes_is_copied_ahead_as_far_as_there_is_room():
    matrices, cache = Matrices(6), ExpertCache(3 * ONE)
    matrices.plan(cache, 0, 1, 2, 3)
    matrices.fetch(cache, 0)
    assert held(cache) == [0, 1, 2]
    matrices.fetch(cache, 1, 2, 3)
    assert cache.summary() == {
        "hits": 3,
        "misses": 1,
        "prefetched_bytes": 3 * ONE,
        "copied_bytes": ONE,
        "evicted": 1,
        "held_bytes": 3 * ONE,
        "capacity_bytes": 3 * ONE,
    }


def test_what_is_needed_is_never_evicted_for_what_is_guessed():
    matrices, cache = Matrices(6), ExpertCache(2 * ONE)
    matrices.plan(cache, 0, 1, 5)
    matrices.fetch(cache, 0)
    assert set(held(cache)) == {0, 1}
    matrices.fetch(cache, 1)
    assert set(held(cache)) == {1, 5}


@pytest.mark.parametrize("capacity", [1, 2, 3, 7])
def test_prefetch_changes_no_result_and_no_copy_is_made_twice(capacity):
    torch.manual_seed(0)
    order = torch.randint(6, (200,)).tolist()
    counts = []
    for prefetch in (True, False, True):
        matrices, cache = Matrices(6), ExpertCache(capacity * ONE, prefetch=prefetch)
        for start in range(0, len(order), 10):
            part = order[start : start + 10]
            matrices.plan(cache, *part)
            matrices.fetch(cache, *part)
        counts.append(cache.summary())
        assert counts[-1]["hits"] + counts[-1]["misses"] == len(order)
        cache.close()
    assert counts[0] == counts[2]  # from the order of the questions alone, not from the clock
    assert counts[1]["prefetched_bytes"] == 0
    assert counts[0]["misses"] <= counts[1]["misses"]


def test_another_order_than_announced_is_served_all_the_same():
    matrices, cache = Matrices(6), ExpertCache(2 * ONE)
    matrices.plan(cache, 0, 1, 2)
    matrices.fetch(cache, 0, 4, 5, 2, 1, 3, 0)


def test_forgetting_reads_changed_matrices_again():
    matrices, cache = Matrices(4), ExpertCache(4 * ONE)
    matrices.plan(cache, 0, 1, 2)
    matrices.fetch(cache, 0)
    cache.invalidate()
    matrices.values += 1
    assert held(cache) == [] and cache.summary()["held_bytes"] == 0
    matrices.fetch(cache, 0, 1)


def test_forgetting_waits_for_the_copy_under_way():
    go = Event()
    matrices, cache = Matrices(2), ExpertCache(2 * ONE)
    matrices.plan(cache, 0, 1)
    matrices.fetch(cache, 0)
    cache._entries[1].copy = cache._thread.submit(lambda: (go.wait(10), matrices.values[1])[1])
    Timer(0.1, go.set).start()
    cache.invalidate()
    assert go.is_set() and held(cache) == []


def test_an_error_of_the_copying_thread_is_raised_where_the_matrix_is_needed():
    class LostError(RuntimeError):
        pass

    def lose() -> None:
        raise LostError("gone")

    matrices, cache = Matrices(2), ExpertCache(2 * ONE)
    matrices.plan(cache, 0, 1)
    matrices.fetch(cache, 0)
    cache._entries[1].copy = cache._thread.submit(lose)
    with pytest.raises(LostError, match="gone"):
        cache.fetch(*matrices.key(1))


def test_closing_ends_the_thread():
    matrices, cache = Matrices(3), ExpertCache(3 * ONE)
    matrices.plan(cache, 0, 1, 2)
    matrices.fetch(cache, 0, 1, 2)
    (thread,) = cache._thread._threads
    cache.close()
    assert not thread.is_alive()
    matrices.fetch(cache, 2)


@pytest.mark.parametrize("odd", [0, 1, 3, 7])
def test_a_copy_has_the_alignment_of_its_source(odd):
    flat = torch.randn(odd + 35)
    matrix = flat[odd : odd + 35].view(5, 7)
    copy = ExpertCache(1000).fetch("a", lambda: matrix)
    assert copy.data_ptr() % 64 == matrix.data_ptr() % 64
    assert torch.equal(copy, matrix) and copy.is_contiguous()
