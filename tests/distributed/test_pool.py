"""The harness itself: results by rank, failures with their rank, hangs with their stack."""

import os
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from helpers.pool import RankError


@dataclass
class Pair:
    left: torch.Tensor
    right: str


def rank_and_sum(world, x):
    dist.all_reduce(x, group=world.group)
    return world.rank, dist.get_world_size(), x


def process_id(world):
    return os.getpid()


def swap(world, pair):
    return Pair(pair.left + world.rank, pair.right * 2)


def fail_on(world, bad_rank):
    expected = world.rank + 10
    if world.rank == bad_rank:
        raise ValueError(f"no luck with {expected}")
    dist.barrier(group=world.group)


def fail_everywhere(world):
    raise KeyError("everywhere")


def print_and_exit(world):
    print("last words", flush=True)
    os._exit(3)


def sleep_on(world, sleepy_rank):
    if world.rank == sleepy_rank:
        time.sleep(60)


def leave_traces(world):
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    os.environ["MOE_TRACE"] = "1"
    dist.new_group([0])
    return torch.rand(1).item()


def find_traces(world):
    groups = len(dist.distributed_c10d._world.pg_map)
    modes = torch.get_default_dtype() is torch.float32 and torch.is_grad_enabled()
    return torch.rand(1).item(), groups, modes, os.environ.get("MOE_TRACE")


def all_dtypes(world):
    return {
        name: torch.arange(6).reshape(2, 3).t()[world.rank :].to(getattr(torch, name))
        for name in ("bool", "int64", "bfloat16", "float16", "float32", "float64")
    } | {"empty": torch.empty(0, 5), "scalar": torch.tensor(2.5, requires_grad=True) * 2}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_answers(torch_pool, world_size):
    results = torch_pool.run(rank_and_sum, torch.ones(2), world_size=world_size)
    assert [r[:2] for r in results] == [(rank, world_size) for rank in range(world_size)]
    for _, _, total in results:
        torch.testing.assert_close(total, torch.full((2,), float(world_size)))


def test_workers_persist(torch_pool):
    assert torch_pool.run(process_id) == torch_pool.run(process_id)


def test_a_call_costs_milliseconds(torch_pool):
    torch_pool.run(rank_and_sum, torch.ones(2), world_size=4)
    start = time.perf_counter()
    for _ in range(10):
        torch_pool.run(rank_and_sum, torch.ones(2), world_size=4)
    assert time.perf_counter() - start < 5.0  # 10 calls; about 0.2 s on an idle machine


def test_classes_of_the_test_file_travel(torch_pool):
    results = torch_pool.run(swap, Pair(torch.zeros(1), "ab"))
    assert [type(r) for r in results] == [Pair, Pair]
    assert [(r.left.item(), r.right) for r in results] == [(0.0, "abab"), (1.0, "abab")]


def test_tensors_travel_by_value(torch_pool):
    for rank, result in enumerate(torch_pool.run(all_dtypes)):
        whole = torch.arange(6).reshape(2, 3).t()[rank:]
        for name in ("bool", "int64", "bfloat16", "float16", "float32", "float64"):
            assert torch.equal(result[name], whole.to(getattr(torch, name)))
        assert result["empty"].shape == (0, 5)
        assert result["scalar"].item() == 5.0 and not result["scalar"].requires_grad


def test_failing_rank_is_named_with_its_traceback(torch_pool):
    before = torch_pool.run(process_id)
    with pytest.raises(RankError) as failure:
        torch_pool.run(fail_on, 1)
    text = str(failure.value)
    assert text.startswith("fail_on on 2 ranks: rank 1: ValueError: no luck with 11\n")
    assert "--- rank 1: ValueError" in text and "test_pool.py" in text
    assert "expected = 11" in text  # locals stand in for pytest's assertion rewriting
    assert "rank 0 still running when another rank failed" in text and "barrier" in text
    assert set(torch_pool.run(process_id)).isdisjoint(before)


def test_same_failure_everywhere_is_shown_once(torch_pool):
    with pytest.raises(RankError, match="--- ranks 0, 1, 2: KeyError") as failure:
        torch_pool.run(fail_everywhere, world_size=3)
    assert str(failure.value).count("Traceback") == 1


def test_a_dead_rank_leaves_its_last_words(torch_pool):
    with pytest.raises(RankError, match=r"ranks 0, 1: its process ended(.|\n)*last words"):
        torch_pool.run(print_and_exit)


def test_time_limit_names_the_hung_rank_and_its_stack(torch_pool):
    start = time.perf_counter()
    with pytest.raises(RankError) as failure:
        torch_pool.run(sleep_on, 1, timeout=1.0)
    assert time.perf_counter() - start < 20
    text = str(failure.value)
    assert "sleep_on: over 1 s" in text
    assert "rank 1 did not come back" in text and "in sleep_on" in text
    assert "rank 0 did not" not in text
    assert [r[0] for r in torch_pool.run(rank_and_sum, torch.ones(1))] == [0, 1]


def test_nothing_leaks_into_the_next_call(torch_pool):
    clean = torch_pool.run(find_traces)
    torch_pool.run(leave_traces)
    assert torch_pool.run(find_traces) == clean
    assert [result[1:] for result in clean] == [(1, True, None)] * 2


def test_only_top_level_functions_can_be_sent(torch_pool):
    with pytest.raises(ValueError, match="cannot be sent to a worker; use a top-level function"):
        torch_pool.run(lambda world: None)
