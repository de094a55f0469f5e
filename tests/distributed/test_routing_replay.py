"""Records of decisions: written, taken again, compared with; and Megatron's own replay object."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.layout import Layout
from helpers.pool import RankError
from helpers.runs import Job, Means
from helpers.stability_run import train_steps

from megatron_moe.config import MoEConfig

EP2 = Means(layout=Layout(ep=2))


def run(pool, world_size: int = 1, means: Means = Means(), job: Job = Job(), **moe):  # noqa: B008
    job = replace(job, steps=2, moe=replace(job.moe, **moe))
    return pool.run(train_steps, job, means, world_size=world_size, timeout=120)


def arrays(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    files = sorted(folder.rglob("*.npz"))
    return {str(f.relative_to(folder)): dict(np.load(f)) for f in files}


@pytest.mark.parametrize(("world_size", "means"), [(1, Means()), (2, EP2)], ids=["one", "ep2"])
def test_a_record_is_replayed_and_verified(pool, tmp_path, world_size, means):
    first, again, other = (str(tmp_path / name) for name in ("first", "again", "other"))
    run(pool, world_size, means, routing_record=first)
    found = arrays(tmp_path / "first")
    files = [f"batch-{b:06d}/rank-{r:04d}.npz" for b in range(2) for r in range(world_size)]
    assert sorted(found) == sorted(files)
    assert found[files[0]]["layer1.call0"].shape == (8, 2)
    run(pool, world_size, means, routing_replay=first, routing_verify=True)
    # Noise would choose others; the record says what is chosen all the same.
    run(pool, world_size, means, routing_record=other, logit_noise_std=3.0)
    run(pool, world_size, means, routing_replay=first, routing_record=again, logit_noise_std=3.0)
    assert not same(found, arrays(tmp_path / "other"))
    assert same(found, arrays(tmp_path / "again"))


def test_what_is_drawn_is_drawn_again(pool, tmp_path):
    """Noise, jitter, a random second expert, random drops: the same seed, the same decisions."""
    drawn = {"router_choice": "gshard", "second_expert": "random", "drop_order": "random"}
    model = {"moe_input_jitter_eps": 0.1, "moe_expert_capacity_factor": 1.0}
    job, folder = Job(model=model), str(tmp_path / "first")
    run(pool, 2, EP2, job, routing_record=folder, logit_noise_std=0.5, **drawn)
    verify = {"routing_replay": folder, "routing_verify": True}
    run(pool, 2, EP2, job, logit_noise_std=0.5, **drawn, **verify)


def same(one, other) -> bool:
    return all(np.array_equal(one[f][k], other[f][k]) for f in one for k in one[f])


def test_a_record_of_adaptive_choices_keeps_places_without_one(pool, tmp_path):
    job = Job(moe=MoEConfig(router_choice="top_p", k_max=4))
    first, again = str(tmp_path / "first"), str(tmp_path / "again")
    run(pool, job=job, routing_record=first)
    found = arrays(tmp_path / "first")
    assert any((a < 0).any() for file in found.values() for a in file.values())
    run(pool, job=job, routing_replay=first, routing_record=again, logit_noise_std=3.0)
    assert same(found, arrays(tmp_path / "again"))


def test_recompute_takes_one_decision_for_both_passes(pool, tmp_path):
    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    job = Job(model=full | {"recompute_num_layers": 1})
    run(pool, job=job, routing_record=str(tmp_path / "full"))
    run(pool, routing_record=str(tmp_path / "plain"))
    assert same(arrays(tmp_path / "plain"), arrays(tmp_path / "full"))


def test_what_does_not_fit_is_said(pool, tmp_path):
    folder = str(tmp_path / "first")
    run(pool, routing_record=folder)
    with pytest.raises(RankError, match=r"batch 0, layer1.call0: \d+ of 8 tokens chose other exp"):
        run(pool, routing_replay=folder, routing_verify=True, logit_noise_std=3.0)
    with pytest.raises(RankError, match=r"rank-0001.npz does not exist: routing_replay needs"):
        run(pool, 2, EP2, routing_replay=folder)
    longer = Job(sequence_length=16)
    with pytest.raises(RankError, match=r"has 8 tokens for layer1.call0, where this run decides"):
        run(pool, job=longer, routing_replay=folder)


def test_megatrons_own_replay_steers_the_router(pool):
    pool.run(_megatrons_replay, world_size=1)


def _megatrons_replay(world):
    from helpers.training_run import Training
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    training = Training(Job(model={"moe_enable_routing_replay": True}), Means())
    router = training.chunks[0].decoder.layers[0].mlp.router.eval()
    hidden, other = torch.randn(8, 1, 16), torch.randn(8, 1, 16)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    recorded = router(hidden).indices_TK
    assert torch.equal(router.router_replay.get_recorded_indices(), recorded)
    RouterReplay.clear_global_router_replay_action()
    assert not torch.equal(router(other).indices_TK, recorded)
    router.router_replay.set_target_indices(recorded)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    assert torch.equal(router(other).indices_TK, recorded)
    RouterReplay.clear_global_router_replay_action()
    RouterReplay.clear_global_router_replay_instances()
