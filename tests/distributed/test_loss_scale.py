"""FP16 on a CPU: the loss scale grows, overflows, skips, recovers; one scale for all parameters."""

import math
from itertools import pairwise

import pytest
import torch
from helpers.layout import Layout
from helpers.runs import Job, Means

FP16 = {"fp16": True, "params_dtype": torch.float16}
EP2 = Means(layout=Layout(ep=2))
# Two experts, all of one rank, get no token.
IDLE = Job(model=FP16, empty_experts=(2, 3), steps=4)


def steps(pool, means=EP2, world_size=2, **plan):
    from helpers.scaler_run import Plan, scaler_steps

    plan = Plan(means=means, **plan)
    return pool.run(scaler_steps, plan, world_size=world_size, timeout=120)


def test_overflows_are_skipped_until_the_scale_fits(pool):
    job = Job(model=FP16, empty_experts=(2, 3), steps=16)
    ranks = steps(pool, job=job, scale=2.0**24)
    for seen in ranks:
        skipped = [s for s in seen if not s.stepped]
        assert skipped and all(s.unchanged for s in skipped)
        assert seen[-1].stepped and not seen[-1].unchanged
        assert all(s.finite and math.isfinite(s.loss) for s in seen)
        for before, after in pairwise(seen):
            factor = 1.0 if before.stepped else 0.5
            assert after.scales == [factor * scale for scale in before.scales]


def test_scale_grows_after_good_steps(pool):
    for seen in steps(pool, job=IDLE, scale=64.0, growth_interval=2):
        assert all(s.stepped for s in seen)
        assert [s.scales[0] for s in seen] == [64.0, 64.0, 128.0, 128.0]


@pytest.mark.parametrize("where", ["experts", "router"])
@pytest.mark.parametrize("distributed", [False, True])
def test_an_overflow_anywhere_moves_every_scale(pool, where, distributed):
    means = Means(layout=Layout(ep=2), distributed_optimizer=distributed)
    for seen in steps(pool, means, job=IDLE, scale=1024.0, spoilt=(1,), where=where):
        assert [s.stepped for s in seen] == [True, False, True, True]
        assert seen[1].unchanged
        assert [s.scales for s in seen] == [[1024.0] * 2] * 2 + [[512.0] * 2] * 2


def test_one_scale_in_all_layouts(pool):
    for world_size, layout in ((1, Layout()), (2, Layout(tp=2)), (4, Layout(tp=2, ep=2))):
        for seen in steps(pool, Means(layout=layout), world_size, job=IDLE, scale=8.0):
            assert all(s.stepped and set(s.scales) == {8.0} for s in seen)
