"""What `inspect` says of a checkpoint, without reading a tensor."""

from math import prod
from pathlib import Path
from typing import Any

import pytest
from helpers.synthetic import Arch, made

from megatron_moe.tools.checkpoint.inspect import facts, warnings
from megatron_moe.tools.checkpoint.read.open import open_checkpoint
from megatron_moe.tools.checkpoint.read.opened import Opened

ARCH = Arch(moe=(False, True, True, False), mtp=1, engine=True, grouped=True)


def opened(folder: Path, arch: Arch = ARCH, **wishes: Any) -> Opened:
    return open_checkpoint(made(folder, arch, **wishes))


def test_facts_of_a_torch_checkpoint(tmp_path: Path) -> None:
    wishes = {"form": "torch", "tp": 2, "pp": 2, "vpp": 2, "ep": 2, "etp": 2, "dp": 2}
    found = opened(tmp_path / "save", **wishes, optim="fully")
    said = facts(found)
    states = 4 * said["parameters"]
    assert said == {
        "folder": f"{tmp_path}/save/iter_0000007",
        "format": "torch",
        "written by Megatron": "0.19 or alike",
        "iteration": 7,
        "layout": "TP2·PP2·VPP2·EP2·ETP2·DP2",
        "ranks": 8,
        "layers": 4,
        "layers by stage": [[1, 1], [1, 1]],
        "MTP layers": 1,
        "experts": 4,
        "experts per rank": 2,
        "MoE layers": "1-2",
        "expert keys": "grouped",
        "norm names": "Transformer Engine",
        "layers in torch_dist": None,
        "parameters": sum(prod(shape) for shape, _ in ARCH.shapes().values()),
        "weight types": ["bfloat16"],
        "optimizer": "distributed",
        "bytes": {
            "weight": states // 2, "master": states, "exp_avg": states, "exp_avg_sq": states
        },
        "files": len([p for p in found.folder.rglob("*") if p.is_file()]),
        "bytes on disk": sum(p.stat().st_size for p in found.folder.rglob("*") if p.is_file()),
        "random states": 4,
        "tensors in no rule": [],
    }  # fmt: skip


@pytest.mark.parametrize(("moe", "stacking"), [((True, True), "one tensor for all"),
                                               ((True, False), "a tensor each")])  # fmt: skip
def test_facts_of_a_torch_dist_checkpoint(tmp_path: Path, moe: tuple, stacking: str) -> None:
    said = facts(opened(tmp_path / "save", Arch(moe=moe), form="torch_dist", optim="fully"))
    assert said["layers in torch_dist"] == stacking
    assert said["format"] == "torch_dist"
    assert said["norm names"] == "local"
    assert said["optimizer"] == "fully_reshardable"


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    said = facts(opened(tmp_path / "save", Arch(moe=(False,)), form="torch", optim="drop"))
    assert (said["experts"], said["experts per rank"], said["expert keys"]) == (0, 0, None)
    assert (said["MoE layers"], said["optimizer"]) == ("none", None)


def test_nothing_is_known_to_go_wrong_with_most(tmp_path: Path) -> None:
    assert warnings(opened(tmp_path / "save", form="torch_dist", optim="fully", ep=2, dp=2)) == []


def test_dp_reshardable_is_warned_of(tmp_path: Path) -> None:
    assert warnings(opened(tmp_path / "save", form="torch_dist", optim="dp")) == [
        "dp_reshardable: Megatron itself can only change DP of this optimizer state; reshard with "
        "--optim fully to be free of that"
    ]


def test_several_buckets_of_fully_reshardable_are_warned_of(tmp_path: Path) -> None:
    found = opened(tmp_path / "save", form="torch_dist", optim="fully", dp=2)
    found.args.overlap_grad_reduce = True
    assert warnings(found) == [
        "fully_reshardable saved with overlapped gradient reduction (several buckets): up to "
        "0.19.2 Megatron may have written shifted optimizer state (its PR 5077); run "
        "`megatron-moe verify` to know"
    ]
    found.args.data_parallel_size = 1
    found.layout = type(found.layout)()
    assert warnings(found) == []


def test_an_older_form_of_the_optimizer_is_warned_of(tmp_path: Path) -> None:
    found = opened(tmp_path / "save", form="torch_dist", optim="fully")
    assert found.optimizer is not None
    found.optimizer.kind = "fully_sharded_model_space"
    assert warnings(found) == [
        "fully_sharded_model_space: Megatron from 0.16 on cannot read this optimizer state; "
        "reshard it (--dialect 0.19)"
    ]


def test_random_states_of_an_older_dialect_are_warned_of(tmp_path: Path) -> None:
    found = opened(tmp_path / "save", form="torch_dist", optim="fully", ep=2, dp=2, dialect="0.16")
    assert found.dialect == "0.16"
    assert warnings(found) == [
        "random states under the keys of 0.16: Megatron 0.19 needs --no-load-rng"
    ]


def test_a_checkpoint_without_optimizer_says_so(tmp_path: Path) -> None:
    assert "no optimizer state" in warnings(opened(tmp_path / "save", form="torch", optim="drop"))
