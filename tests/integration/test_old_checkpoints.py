"""A checkpoint of Megatron 0.14, whose optimizer state later versions cannot read."""

import tarfile
from pathlib import Path

import pytest

from megatron_moe.tools.checkpoint.plan.compile import compile_plan
from megatron_moe.tools.checkpoint.plan.request import Request, resolve
from megatron_moe.tools.checkpoint.read.open import open_checkpoint
from megatron_moe.tools.checkpoint.verify import compare, verify
from megatron_moe.tools.checkpoint.write.execute import Options, execute

_DATA = Path(__file__).parents[1] / "data" / "megatron_0_14.tar.xz"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(_DATA) as packed:
        packed.extractall(folder, filter="data")
    return open_checkpoint(next(folder.iterdir()))


def test_is_understood(old):
    assert (old.dialect, str(old.layout)) == ("0.14", "TP2·PP1·EP1·ETP2·DP2")
    assert old.optimizer.kind == "fully_sharded_model_space"
    assert old.inventory.num_experts == 4


def test_masters_round_to_their_weights(old):
    verdict = verify(old)
    assert verdict.faults == []
    assert verdict.checked["masters"] == 37


@pytest.mark.parametrize(
    "request_",
    [
        Request(form="torch_dist", dialect="0.19", pp=2, tp=1, etp=1),
        Request(form="torch", ep=2, etp=1),
        Request(form="torch_dist", dialect="0.16", optim="dp", ep=4, tp=1, etp=1, dp=4),
    ],
    ids=["fully", "torch", "dp"],
)
def test_nothing_is_lost_on_the_way_to_newer_forms(old, tmp_path, request_):
    execute(compile_plan(old, resolve(old, request_)), tmp_path, Options())
    new = open_checkpoint(tmp_path)
    assert verify(new).faults == []
    assert compare(old, new, {}, {}) == []
