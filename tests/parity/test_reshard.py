"""Megatron is the judge: a resharded checkpoint trains on as if nothing had happened.

A real run is saved, resharded offline, loaded by Megatron with strict keys at another layout,
format and kind of optimizer, and trained: its losses are those that the saved run went on with.
In fp32, where a wrong moment or a swapped row shows; one round trip in bf16, bit by bit.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.layout import Layout
from helpers.saved_run import DOZEN, SavedRun, assert_same_losses, resume, train_and_save

from megatron_moe.tools.checkpoint.plan.compile import compile_plan
from megatron_moe.tools.checkpoint.plan.request import Request, resolve
from megatron_moe.tools.checkpoint.read.open import open_checkpoint
from megatron_moe.tools.checkpoint.write.execute import Options, execute

_OPTIM = {"plain": "plain", "distributed": "dp", "fully": "fully", "none": "drop"}


@dataclass(frozen=True)
class To:
    """What a checkpoint is resharded to, and on how many ranks it goes on."""

    layout: Layout
    world_size: int
    form: str = "torch_dist"
    optimizer: str = "fully"
    flags: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.form}-{self.optimizer}-{self.layout}"


def target_run(source: SavedRun, to: To) -> SavedRun:
    """Return the run that goes on: the source's model at the target's layout."""
    drop = {"--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"}
    flags = list(source.flags)
    for name in drop & set(flags):
        at = flags.index(name)
        del flags[at : at + 2]
    optimizer = source.optimizer if source.optimizer == "none" else to.optimizer
    if to.form == "torch" and optimizer == "fully":
        optimizer = "distributed"
    return replace(
        source,
        layout=to.layout,
        world_size=to.world_size,
        form=to.form,
        optimizer=optimizer,
        flags=(*flags, *to.flags),
        # Flat buffers are cut as the run's arguments say; Megatron cannot load `fully` in several.
        overlap=source.overlap and optimizer == "distributed",
    )


def reshard(source: Path, out: Path, to: To, optimizer: str) -> None:
    sizes = to.layout
    dp = to.world_size // (sizes.tp * sizes.pp)
    request = Request(
        tp=sizes.tp,
        pp=sizes.pp,
        vpp=sizes.vpp,
        ep=sizes.ep,
        etp=sizes.etp,
        dp=dp,
        form=to.form,
        optim=_OPTIM[optimizer],
        **to.options,
    )
    opened = open_checkpoint(source)
    execute(compile_plan(opened, resolve(opened, request)), out, Options())


TRIPS = {
    "dist_fully_tp2ep2": [
        To(Layout(pp=2, ep=1, etp=1, tp=1), 2),
        To(Layout(tp=1, ep=4), 4, "torch"),
        To(Layout(tp=2, pp=2, ep=2), 4, optimizer="distributed"),
        To(Layout(tp=2, pp=1, ep=1, etp=2), 2, "torch", "plain"),
    ],
    "dist_fully_router_state": [
        To(Layout(tp=2, ep=2), 4),
        To(Layout(tp=2), 2, "torch", "plain"),
    ],
    "dist_fully_tp2etp2": [
        To(Layout(pp=2, vpp=2), 2, optimizer="distributed"),
        To(Layout(tp=2, ep=2), 2, "torch"),
    ],
    "dist_fully_mtp_shared_bias": [
        To(Layout(tp=2, pp=2), 4),
        To(Layout(tp=2, ep=2), 2, "torch"),
    ],
    "dist_fully_pp2_tied": [
        To(Layout(tp=2), 2, "torch"),
        To(Layout(pp=4, ep=1), 4, optimizer="distributed"),
    ],
    "dist_fully_uneven_dp2": [
        To(Layout(ep=2), 2, "torch", "plain"),
        To(
            Layout(pp=2, ep=2),
            4,
            flags=(
                "--decoder-first-pipeline-num-layers",
                "2",
                "--decoder-last-pipeline-num-layers",
                "3",
            ),
            options={"first": 2, "last": 3},
        ),
    ],
    "dist_dp_tp2pp2ep2": [
        To(Layout(ep=2), 2),
        To(Layout(tp=2, etp=2), 2, optimizer="distributed"),
    ],
    "dist_dp_dp2_buckets": [To(Layout(tp=2, ep=2), 2), To(Layout(pp=2), 2, "torch")],
    "dist_dp_etp2": [To(Layout(ep=2), 2, optimizer="plain"), To(Layout(tp=2, ep=1), 2, "torch")],
    "dist_dp_vpp_tied": [To(Layout(tp=2), 2), To(Layout(ep=2), 2, optimizer="distributed")],
    "dist_plain_ep2": [
        To(Layout(tp=2, etp=2), 2, optimizer="plain"),
        To(Layout(tp=1), 1, "torch", "distributed"),
    ],
    "dist_plain_biases": [
        To(Layout(pp=2), 2, "torch", "plain"),
        To(
            Layout(pp=2, vpp=2),
            2,
            "torch",
            "plain",
            flags=("--pipeline-model-parallel-layout", "Et|tt|t|L"),
            options={"pipeline_layout": "Et|tt|t|L"},
        ),
    ],
    "torch_distopt_tp2pp2ep2": [
        To(Layout(tp=2, ep=4), 4),
        To(Layout(pp=4), 4, "torch"),
        To(Layout(ep=2), 2, "torch", "plain"),
    ],
    "torch_distopt_vpp": [To(Layout(tp=2, ep=2), 2), To(Layout(ep=4), 4, "torch")],
    "torch_distopt_dp2_buckets": [To(Layout(tp=2), 2, optimizer="distributed")],
    "torch_distopt_pp2_tied": [To(Layout(tp=2, pp=2, ep=2), 4, "torch"), To(Layout(), 1)],
    "torch_distopt_mtp": [To(Layout(ep=4), 4)],
    "torch_plain_ep2": [To(Layout(tp=2, pp=2), 4, "torch", "plain"), To(Layout(pp=2), 2)],
    "torch_plain_tp2_biases": [To(Layout(ep=4), 4, optimizer="plain")],
    "torch_plain_fp32": [To(Layout(pp=2, ep=2), 4, "torch", "distributed")],
    "torch_none_ep2": [To(Layout(tp=2), 2)],
}


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    """``(run, folder, losses)`` of a source in fp32, trained once."""
    made: dict[str, tuple[SavedRun, Path, list[float]]] = {}

    def get(name: str) -> tuple[SavedRun, Path, list[float]]:
        if name not in made:
            run = replace(DOZEN[name], bf16=False)
            folder = tmp_path_factory.mktemp(name)
            losses = pool.run(train_and_save, run, str(folder), world_size=run.world_size)[0]
            made[name] = run, folder, losses[2:]
        return made[name]

    return get


def _cases() -> list:
    """Two trips from each source by default, the rest on request."""
    return [
        pytest.param(name, to, id=f"{name}-{to}", marks=[pytest.mark.slow] if i > 1 else [])
        for name, targets in TRIPS.items()
        for i, to in enumerate(targets)
    ]


@pytest.mark.parametrize(("name", "to"), _cases())
def test_training_goes_on(pool, saved, tmp_path, name, to):
    source, folder, losses = saved(name)
    run = target_run(source, to)
    reshard(folder, tmp_path / "out", to, run.optimizer)
    found = pool.run(resume, run, str(tmp_path / "out"), world_size=run.world_size)[0]
    count = 1 if run.optimizer == "none" else len(losses)
    assert_same_losses(found[:count], losses[:count], bf16=False)


@pytest.mark.parametrize("name", ["dist_dp_tp2pp2ep2", "torch_distopt_tp2pp2ep2"])
def test_there_and_back_in_bf16_bit_by_bit(pool, tmp_path, name):
    run = DOZEN[name]
    losses = pool.run(train_and_save, run, str(tmp_path / "a"), world_size=run.world_size)[0]
    away = To(Layout(), 1, "torch" if run.form == "torch_dist" else "torch_dist", "plain")
    reshard(tmp_path / "a", tmp_path / "b", away, "plain")
    back = To(run.layout, run.world_size, run.form)
    reshard(tmp_path / "b", tmp_path / "c", back, run.optimizer)
    # The random states stayed behind where TP and PP changed.
    again = replace(run, flags=(*run.flags, "--no-load-rng"))
    found = pool.run(resume, again, str(tmp_path / "c"), world_size=run.world_size)[0]
    assert_same_losses(found, losses[2:], exact=True)


def _save_singletons(world, run: SavedRun, folder: str) -> list[float]:
    """Save with one key for each layer and expert, as Megatron can be told to from Python."""
    from unittest import mock

    from helpers import saving
    from megatron.training import checkpointing

    name = "_build_sharded_state_dict_metadata"
    original = getattr(checkpointing, name)

    def singletons(*args: Any, **kwargs: Any) -> dict:
        return original(*args, **kwargs) | {"singleton_local_shards": True}

    with mock.patch.object(checkpointing, name, singletons):
        return saving.train_and_save(run, folder, 2, 5)


def test_one_key_for_each_layer_and_expert(pool, tmp_path):
    source = replace(DOZEN["dist_fully_tp2ep2"], bf16=False)
    losses = pool.run(_save_singletons, source, str(tmp_path / "a"), world_size=2)[0]
    to = To(Layout(pp=2, ep=2), 4)
    reshard(tmp_path / "a", tmp_path / "b", to, "fully")
    found = pool.run(resume, target_run(source, to), str(tmp_path / "b"), world_size=4)[0]
    assert_same_losses(found, losses[2:], bf16=False)
