"""Phases belong to iterations, exactly, also across a restart; noise fades on a line."""

import pytest
import torch
from helpers.choosing import options

from megatron_moe.config import MoEConfig
from megatron_moe.route.schedule import Schedule


def schedule(jitter=None, **moe):
    part = Schedule(options(moe_input_jitter_eps=jitter), MoEConfig(**moe))
    part.state = part.buffers()
    return part


def restarted(part, jitter=None, **moe):
    """A new process that loads the buffers of the old one."""
    fresh = schedule(jitter, **moe)
    assert fresh.finished == 0
    fresh.state = {name: value.clone() for name, value in part.state.items()}
    fresh.loaded()
    return fresh


@pytest.mark.parametrize("restart_at", [None, 1, 2, 3])
def test_the_boundaries_are_exact_also_across_a_restart(restart_at):
    moe = {"gate_pretrain_iters": 2, "router_freeze_iter": 4}
    part, seen = schedule(**moe), []
    for iteration in range(6):
        if iteration == restart_at:
            part = restarted(part, **moe)
        seen.append((part.gate_only, part.frozen))
        part.end_batch(None)
    assert [gate_only for gate_only, _ in seen] == [True, True, False, False, False, False]
    assert [frozen for _, frozen in seen] == [False, False, False, False, True, True]


def test_frozen_from_the_start():
    assert schedule(router_freeze_iter=0).frozen
    assert not schedule().frozen


def test_nothing_is_kept_where_nothing_depends_on_it():
    assert schedule().buffers() == {}
    assert schedule(logit_noise_std=1.0).buffers() == {}
    part = schedule()
    part.end_batch(None)
    assert part.finished == 0


def test_noise_fades_on_a_line_and_ends():
    part, shares = schedule(logit_noise_std=1.0, noise_anneal_iters=4), []
    for _ in range(6):
        shares.append(part.noise_share)
        part.end_batch(None)
    assert shares == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    x = torch.zeros(4)
    assert part.noisy(x) is x


def test_the_noise_has_the_size_that_was_asked_for():
    torch.manual_seed(0)
    part = schedule(jitter=0.2, logit_noise_std=0.5, noise_anneal_iters=2)
    x = torch.ones(50_000)
    for share in (1.0, 0.5):
        noise, jittered = part.noisy(x) - x, part.jittered(x)
        assert noise.std().item() == pytest.approx(0.5 * share, rel=0.02)
        assert abs(noise.mean().item()) < 0.02
        assert jittered.min() >= 1 - 0.2 * share and jittered.max() <= 1 + 0.2 * share
        assert jittered.std().item() == pytest.approx(0.2 * share / 3**0.5, rel=0.02)
        part.end_batch(None)
    assert part.jittered(x) is x
