"""The judge of checkpoints, judged: what Megatron saved it resumes, and no bit of a loss differs.

The runs are Megatron's own, by its own functions, from flags as a user types them. A resume on the
layout of the save is exact; on another one it is close; and a checkpoint with a fault is found out.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.layout import Layout
from helpers.pool import RankError
from helpers.saved_run import (
    DOZEN,
    SavedRun,
    assert_same_losses,
    iteration_folder,
    resume,
    train_and_save,
)

BEFORE = 2
SOURCES = (
    "dist_fully_mtp_shared_bias",
    "dist_fully_uneven_dp2",
    "dist_dp_tp2pp2ep2",
    "dist_dp_dp2_buckets",
    "dist_plain_ep2",
    "dist_fully_router_state",
    "torch_distopt_tp2pp2ep2",
    "torch_distopt_vpp",
    "torch_plain_fp32",
)


def saved(pool, run: SavedRun, folder: Path) -> list[float]:
    """Save ``run`` and return the losses after the save; ranks say the same."""
    ranks = pool.run(train_and_save, run, str(folder), BEFORE, world_size=run.world_size)
    assert all(losses == ranks[0] for losses in ranks)
    assert iteration_folder(folder).is_dir()
    return ranks[0][BEFORE:]


def resumed(pool, run: SavedRun, folder: Path) -> list[float]:
    return pool.run(resume, run, str(folder), world_size=run.world_size)[0]


@pytest.mark.parametrize("name", SOURCES)
def test_a_resume_on_the_same_layout_is_exact(pool, tmp_path, name):
    run = DOZEN[name]
    expected = saved(pool, run, tmp_path)
    assert_same_losses(resumed(pool, run, tmp_path), expected, exact=True)


@pytest.mark.parametrize("form", ["torch_dist", "torch"])
def test_state_of_a_router_may_be_asked_for_later_and_left_out_again(pool, tmp_path, form):
    """Megatron itself would end the load at the first key that is missing, or over."""
    plain = replace(DOZEN["dist_fully_fp32"], form=form, optimizer="distributed")
    kept = replace(plain, flags=(*plain.flags, "--moe-probe-tokens", "4"))
    expected = saved(pool, plain, tmp_path / "plain")
    lenient = {"strict": False}
    found = pool.run(resume, kept, str(tmp_path / "plain"), world_size=2, **lenient)[0]
    assert_same_losses(found, expected, exact=True)
    expected = saved(pool, kept, tmp_path / "kept")
    found = pool.run(resume, plain, str(tmp_path / "kept"), world_size=2, **lenient)[0]
    assert_same_losses(found, expected, exact=True)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_resume_on_another_layout_is_close(pool, tmp_path, bf16):
    """By Megatron's own change of layout, from TP=2, EP=2 to EP=2."""
    run = replace(DOZEN["dist_fully_tp2ep2"], bf16=bf16)
    expected = saved(pool, run, tmp_path)
    other = replace(run, layout=Layout(ep=2))
    assert_same_losses(resumed(pool, other, tmp_path), expected, bf16=bf16)


def test_a_fresh_optimizer_is_found_out(pool, tmp_path):
    run = DOZEN["torch_plain_ep2"]
    expected = saved(pool, run, tmp_path)
    found = resumed(pool, replace(run, optimizer="none"), tmp_path)
    assert found[0] == expected[0]  # the weights are right
    with pytest.raises(AssertionError, match="loss of step 1 after the resume"):
        assert_same_losses(found, expected)


def test_keys_left_over_are_found_out(pool, tmp_path):
    """Megatron's own load takes both: tensors that nobody asks for, and weights without a place."""
    run = SavedRun(layout=Layout(ep=2), optimizer="none", flags=("--add-qkv-bias",))
    saved(pool, run, tmp_path / "dist")
    with pytest.raises(RankError, match=r"no rank asks for: .*linear_fc1\.bias"):
        resumed(pool, replace(run, flags=("--disable-bias-linear",)), tmp_path / "dist")
    run = replace(run, form="torch")
    saved(pool, run, tmp_path / "torch")
    with pytest.raises(RankError, match="Unexpected key"):
        resumed(pool, replace(run, flags=("--disable-bias-linear",)), tmp_path / "torch")
