"""Checkpoints go both ways between our layer and Megatron's, and training goes on as it would have.

A run is saved after two steps and goes on for ten; another run, of the other layer or another
layout, loads the checkpoint and trains ten: the losses are the same. ``torch`` files have the same
layout and kind of experts; ``torch_dist`` also changes layout and sequential ↔ stacked experts,
optimizer state included.
"""

from dataclasses import dataclass, replace

import pytest
from helpers.checkpoint_runs import resume, save_and_go_on
from helpers.layout import Layout
from helpers.runs import Job, Means, _loss
from helpers.tolerances import assert_same

MORE = 10
JOB = Job(model={"num_moe_experts": 4})
PLAIN = Job(model={"gated_linear_unit": False, "add_bias_linear": True})
THEIRS = Means(impl="megatron")
OURS = Means()
STACKED = Means(model={"moe_grouped_gemm": True})


@dataclass(frozen=True)
class Trip:
    """From one run to another."""

    name: str
    form: str
    source: Means
    target: Means
    job: Job = JOB
    world_size: int = 2
    target_world: int | None = None
    optimizer: bool = True

    def __str__(self) -> str:
        return f"{self.form}-{self.name}"


def at(means: Means, distributed_optimizer: bool = False, **axes) -> Means:
    return replace(means, layout=Layout(**axes), distributed_optimizer=distributed_optimizer)


TRIPS = [
    Trip("theirs-to-ours", "torch", at(THEIRS, ep=2), at(OURS, ep=2)),
    Trip("ours-to-theirs", "torch", at(OURS, ep=2), at(THEIRS, ep=2)),
    Trip("stacked", "torch", at(STACKED, ep=2), at(STACKED, ep=2)),
    Trip("theirs-to-ours", "torch_dist", at(THEIRS, ep=2), at(OURS, ep=2)),
    Trip("theirs-to-stacked", "torch_dist", at(THEIRS, ep=2), at(STACKED, ep=2)),
    Trip("stacked-to-theirs", "torch_dist", at(STACKED, ep=2), at(THEIRS, ep=2)),
    Trip("ours-to-theirs", "torch_dist", at(OURS, ep=2), at(THEIRS, ep=2)),
    Trip("plain-stacked-to-theirs", "torch_dist", at(STACKED, ep=2), at(THEIRS, ep=2), PLAIN),
    Trip("plain-theirs-to-stacked", "torch_dist", at(THEIRS, ep=2), at(STACKED, ep=2), PLAIN),
    Trip("ep2-to-tp2", "torch_dist", at(STACKED, True, ep=2), at(STACKED, True, tp=2)),
    Trip("tp2-to-ep2", "torch_dist", at(OURS, True, tp=2), at(STACKED, True, ep=2)),
    Trip("etp2-to-ep2", "torch_dist", at(STACKED, True, etp=2), at(THEIRS, True, ep=2)),
    Trip("pp2-to-ep2", "torch_dist", at(STACKED, True, pp=2), at(STACKED, True, ep=2)),
    Trip(
        "theirs-ep4-to-stacked-ep2-tp2",
        "torch_dist",
        at(THEIRS, True, ep=4),
        at(STACKED, True, tp=2, ep=2),
        world_size=4,
    ),
    Trip(
        "stacked-ep4-to-one-process",
        "torch_dist",
        at(STACKED, True, ep=4),
        at(STACKED, True),
        world_size=4,
        target_world=1,
    ),
]


@pytest.mark.parametrize("trip", TRIPS, ids=str)
def test_training_goes_on_with_the_same_losses(pool, tmp_path, trip):
    args = (str(tmp_path), trip.form, MORE)
    before = pool.run(save_and_go_on, trip.job, trip.source, *args, world_size=trip.world_size)
    after = pool.run(
        resume,
        trip.job,
        trip.target,
        *args,
        trip.optimizer,
        world_size=trip.target_world or trip.world_size,
    )
    for step in range(MORE):
        assert_same(
            _loss([rank[step] for rank in after], per_token=False),
            _loss([rank[step] for rank in before], per_token=False),
            f"loss of step {step} after the resume",
        )


WEIGHTS_ONLY = [
    Trip("theirs-to-stacked", "torch", at(THEIRS, ep=2), at(STACKED, ep=2), optimizer=False),
    Trip("stacked-to-theirs", "torch", at(STACKED, ep=2), at(THEIRS, ep=2), optimizer=False),
    Trip("stacked-to-ours", "torch", at(STACKED, ep=2), at(OURS, ep=2), optimizer=False),
]


@pytest.mark.parametrize("trip", WEIGHTS_ONLY, ids=str)
def test_weights_change_their_spelling_in_plain_state_dicts(pool, tmp_path, trip):
    """Megatron's sequential layer does not know grouped keys, so it is given its own."""
    args = (str(tmp_path), trip.form, 1)
    before = pool.run(save_and_go_on, trip.job, trip.source, *args, world_size=2)
    if trip.target.impl == "megatron":
        with pytest.raises(AssertionError, match=r"local_experts\.0\.linear_fc1\.weight"):
            pool.run(resume, trip.job, trip.target, *args, trip.optimizer, world_size=2)
        return
    after = pool.run(resume, trip.job, trip.target, *args, trip.optimizer, world_size=2)
    assert_same(
        _loss([rank[0] for rank in after], per_token=False),
        _loss([rank[0] for rank in before], per_token=False),
        "first loss after the resume",
    )
