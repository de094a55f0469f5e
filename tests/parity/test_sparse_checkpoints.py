"""Masks of 2:4 sparse experts in checkpoints: Megatron's own save and load, and the resharder."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layout import Layout
from helpers.saved_run import SavedRun, assert_same_losses, iteration_folder, resume, train_and_save

from megatron_moe.experts.sparse import two_of_four
from megatron_moe.tools.checkpoint.plan.compile import compile_plan
from megatron_moe.tools.checkpoint.plan.request import Request, resolve
from megatron_moe.tools.checkpoint.read.open import open_checkpoint
from megatron_moe.tools.checkpoint.write.execute import Options, execute

DENSE = ("--swiglu", "--disable-bias-linear", "--num-layers", "2", "--moe-grouped-gemm")
SPARSE = (*DENSE, "--moe-sparse-experts", "2:4", "--moe-sparse-decay", "0.01")
FROZEN = (*SPARSE, "--moe-sparse-freeze-iter", "2")
RUN = SavedRun(layout=Layout(tp=2, etp=2), optimizer="fully", flags=SPARSE, bf16=False)


def saved(pool, run: SavedRun, folder: Path) -> list[float]:
    """Train two steps, save, and return the losses of the two that follow."""
    return pool.run(train_and_save, run, str(folder), 2, 2, world_size=run.world_size)[0][2:]


def resumed(pool, run: SavedRun, folder: Path, **how: Any) -> list[float]:
    return pool.run(resume, run, str(folder), 2, world_size=run.world_size, **how)[0]


@pytest.mark.parametrize(
    ("form", "flags"),
    [
        pytest.param("torch_dist", FROZEN, id="torch_dist-frozen"),
        pytest.param("torch", SPARSE, id="torch-sparse", marks=pytest.mark.slow),
        pytest.param("torch_dist", SPARSE, id="torch_dist-sparse", marks=pytest.mark.slow),
        pytest.param("torch", FROZEN, id="torch-frozen", marks=pytest.mark.slow),
    ],
)
def test_a_resume_is_exact(pool, tmp_path, form, flags):
    run = replace(RUN, form=form, optimizer="distributed", flags=flags, bf16=True)
    expected = saved(pool, run, tmp_path)
    assert_same_losses(resumed(pool, run, tmp_path), expected, exact=True)


@pytest.mark.parametrize("form", ["torch_dist", pytest.param("torch", marks=pytest.mark.slow)])
def test_sparsity_may_begin_with_a_dense_checkpoint_and_end_again(pool, tmp_path, form):
    dense = replace(RUN, form=form, optimizer="distributed", flags=DENSE)
    sparse = replace(dense, flags=SPARSE)
    expected = saved(pool, dense, tmp_path / "dense")
    found = resumed(pool, sparse, tmp_path / "dense", strict=False)
    assert found[0] != expected[0]
    expected = saved(pool, sparse, tmp_path / "sparse")
    found = resumed(pool, dense, tmp_path / "sparse", strict=False)
    assert found[0] != expected[0]


def test_masks_go_through_the_resharder(pool, tmp_path):
    """There from ETP to EP and to the other format, and on to one rank: each fits its weight."""
    expected = saved(pool, RUN, tmp_path / "a")
    reshard(tmp_path / "a", tmp_path / "b", ep=2, form="torch", optim="dp")
    masks = 0
    for path in sorted(iteration_folder(tmp_path / "b").rglob("model_optim_rng.pt")):
        state = torch.load(path, weights_only=False)["model"]
        for key in [key for key in state if ".linear_fc" in key and ".mask" in key]:
            assert state[key].dtype == torch.bool
            assert torch.equal(state[key], two_of_four(state[key.replace(".mask", ".weight")])), key
            masks += 1
    assert masks == 2 * 2 * 4, "layers, linear layers, experts"
    there = replace(RUN, layout=Layout(ep=2), form="torch", optimizer="distributed")
    assert_same_losses(resumed(pool, there, tmp_path / "b"), expected, bf16=False)
    reshard(tmp_path / "b", tmp_path / "c", ep=1, dp=1, optim="fully", form="torch_dist")
    alone = replace(RUN, layout=Layout(), world_size=1)
    ((found, fits),) = pool.run(_load_masks, alone, str(tmp_path / "c"), world_size=1)
    assert fits and all(len(set(pair)) == 2 for pair in pairwise(found)), "each another one"


def _load_masks(world: Any, run: SavedRun, folder: str) -> tuple[list[str], bool]:
    """Load by Megatron; say what the masks are, and whether they fit the weights as loaded."""
    from helpers import saving

    from megatron_moe.experts.sparse import sparse_linears

    with saving._strict(run):
        model = saving.Run(run, "--load", folder, "--exit-on-missing-checkpoint").model
    linears = [linear for chunk in model for linear in sparse_linears(chunk)]
    fits = all(torch.equal(lin.mask, two_of_four(lin.weight)) for lin in linears)
    return [str(lin.mask.int().tolist()) for lin in linears], fits and len(linears) == 4


def reshard(source: Path, out: Path, **wishes: Any) -> None:
    request = Request(**({"tp": 1, "pp": 1, "etp": 1, "dp": 2} | wishes))
    opened = open_checkpoint(source)
    execute(compile_plan(opened, resolve(opened, request)), out, Options())
