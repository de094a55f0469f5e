"""Stability: gate pre-training, freezing, hysteresis and the probe, in real training steps."""

from dataclasses import replace

import pytest
import torch
from helpers.layout import Layout
from helpers.pool import RankError
from helpers.runs import Job, Means
from helpers.stability_run import Steps, is_router, train_steps
from helpers.tolerances import assert_same

from megatron_moe.config import MoEConfig

PLACES = [
    (1, Means()),
    (2, Means(layout=Layout(ep=2), distributed_optimizer=True, overlap=True)),
    (2, Means(layout=Layout(tp=2))),
]
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}


def job_with(steps: int = 4, **moe) -> Job:
    return Job(steps=steps, moe=MoEConfig(**moe))


def steps_of(pool, job: Job, means: Means, world_size: int, **start) -> list[Steps]:
    return pool.run(train_steps, job, means, world_size=world_size, timeout=120, **start)


def moved(steps: Steps, before: int, after: int, routers: bool) -> list[bool]:
    """Whether each weight changed, of the routers or of everything else."""
    old, new = steps.weights[before], steps.weights[after]
    return [not torch.equal(old[n], new[n]) for n in old if is_router(n) == routers]


@pytest.mark.parametrize(("world_size", "means"), PLACES, ids=["one", "ep2-distopt", "tp2"])
def test_only_the_router_learns_at_first(pool, world_size, means):
    for steps in steps_of(pool, job_with(gate_pretrain_iters=2), means, world_size):
        assert all(moved(steps, 0, 1, True)) and all(moved(steps, 1, 2, True))
        assert not any(moved(steps, 0, 2, False))
        assert all(moved(steps, 2, 3, True)) and all(moved(steps, 2, 3, False))
        assert steps.logged[0]["gate_distill_loss"] > 0.0
        assert steps.logged[2]["gate_distill_loss"] == 0.0


def test_after_the_first_phase_the_optimizer_is_as_new(pool):
    job = job_with(gate_pretrain_iters=2, steps=3)
    (phased,) = steps_of(pool, job, Means(), 1)
    fresh_job = replace(job, steps=1, moe=MoEConfig())
    (fresh,) = steps_of(pool, fresh_job, Means(), 1, start=phased.weights[2])
    assert_same(phased.weights[3], fresh.weights[1], "weight after one step")
    assert phased.learned == fresh.learned == {1.0}


def test_the_boundary_survives_a_restart(pool):
    job = job_with(gate_pretrain_iters=3, steps=2)
    (first,) = steps_of(pool, job, Means(), 1)
    (second,) = steps_of(pool, job, Means(), 1, start=first.weights[2], buffers=first.buffers)
    assert not any(moved(second, 0, 1, False)), "the third iteration still belongs to the phase"
    assert all(moved(second, 1, 2, False)), "the fourth does not"


def test_distillation_teaches_the_gate_what_experts_prefer(pool):
    job = job_with(gate_pretrain_iters=30, steps=30)
    (steps,) = steps_of(pool, job, Means(), 1)
    losses = [logged["gate_distill_loss"] for logged in steps.logged]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("layout", "world_size"), [(Layout(ep=2), 2), (Layout(tp=2, ep=2, etp=1), 2)], ids=str
)
def test_pretraining_is_the_same_in_every_layout(pool, layout, world_size):
    job = job_with(gate_pretrain_iters=2, steps=2)
    (one,) = steps_of(pool, job, Means(), 1)
    for steps in steps_of(pool, job, Means(layout=layout), world_size):
        routers = {n: w for n, w in steps.weights[2].items() if is_router(n)}
        assert_same(routers, {n: one.weights[2][n] for n in routers}, "router")


@pytest.mark.parametrize("model", [{}, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [False, True], ids=["optimizer", "distributed-optimizer"])
def test_a_frozen_router_does_not_move_and_the_rest_does(pool, distributed, model):
    job = replace(job_with(router_freeze_iter=2), model=model)
    means = Means(layout=Layout(ep=2), distributed_optimizer=distributed)
    for steps in steps_of(pool, job, means, 2):
        assert all(moved(steps, 0, 2, True))
        assert not any(moved(steps, 2, 4, True))
        assert all(moved(steps, 2, 4, False))


@pytest.mark.parametrize(
    ("layout", "world_size"), [(Layout(), 1), (Layout(ep=2), 2), (Layout(tp=2), 2)], ids=str
)
def test_the_probe_is_the_same_on_all_ranks_and_its_ring_fills(pool, layout, world_size):
    job = job_with(probe_tokens=4)
    found = steps_of(pool, job, Means(layout=layout), world_size)
    for steps in found:
        state = steps.buffers[0]
        assert int(state["probe_count"]) == 4
        ring = state["probe_ring"]
        assert ring.shape == (128, 4, 2)
        assert (ring[:4] >= 0).all() and (ring[4:] == -1).all()
        assert steps.churn[0] == [None, None] and steps.churn[1][0] is not None
        assert_same(steps.logged[3]["router_churn"], sum(steps.churn[3]) / 2)
        for name in ("probe_inputs", "probe_ring"):
            assert torch.equal(state[name], found[0].buffers[0][name])


def test_a_wide_margin_stops_churn_in_repeated_contexts(pool):
    """The same batch again and again: with an infinite margin every choice is the first one."""
    free, held = (
        steps_of(pool, job_with(steps=6, hysteresis_margin=margin), Means(), 1)[0]
        for margin in (1e-9, 1e9)
    )
    churn = [[logged["context_churn"] for logged in s.logged[1:]] for s in (free, held)]
    assert sum(churn[0]) > 0.0
    assert churn[1] == [0.0] * 5


@pytest.mark.parametrize(
    ("layout", "world_size"), [(Layout(ep=2), 2), (Layout(tp=2, ep=2), 4)], ids=str
)
def test_the_cache_is_the_same_in_every_layout(pool, layout, world_size):
    job = job_with(steps=3, hysteresis_margin=0.1)
    (one,) = steps_of(pool, job, Means(), 1)
    for steps in steps_of(pool, job, Means(layout=layout), world_size):
        for layer, state in enumerate(steps.buffers):
            for name in ("context_tags", "context_experts"):
                assert torch.equal(state[name], one.buffers[layer][name]), name
        assert_same(steps.logged[2], one.logged[2], "logged")


def test_a_batch_that_nobody_ends_is_an_error_and_no_silence(pool):
    with pytest.raises(RankError, match="was replaced after the model was built"):
        pool.run(_replaced, world_size=1)


def _replaced(world):
    from helpers.training_run import Training
    from megatron.core.distributed import finalize_model_grads

    model = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
    training = Training(Job(model=model), Means())
    training.config.finalize_model_grads_func = finalize_model_grads
    training.forward_backward()


def test_token_ids_are_asked_for_by_name(pool):
    with pytest.raises(RankError, match="feed_token_ids"):
        pool.run(_without_ids, world_size=1)


def _without_ids(world):
    from helpers.training_run import Training

    training = Training(job_with(hysteresis_margin=1.0), Means())
    training.chunks[0].decoder.layers[0].mlp.router(torch.randn(8, 1, 16))  # no model around it
