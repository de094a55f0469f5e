"""Experts in files train the same model bit for bit, whatever else lies in files."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers.layout import Layout
from helpers.pool import RankError
from helpers.runs import Job, Means, RankRecord
from helpers.runs import train as train_run
from helpers.saved_run import SavedRun, resume, train_and_save

from megatron_moe.config import MoEConfig

# Stacks of more than a page, also when a distributed optimizer cuts them in two.
MODEL = {"moe_grouped_gemm": True, "num_moe_experts": 8, "moe_ffn_hidden_size": 40}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}
ALL = MoEConfig(expert_gemm="loop", expert_offload="file", offload_cache=1, offload_optimizer=True)


@dataclass
class Placed:
    """What lies in files after training, of how many."""

    weights: tuple[int, int]
    main_grads: tuple[int, int]
    main_copies: tuple[int, int]
    moments: tuple[int, int]
    cache: dict[str, int]


def train(world: Any, job: Job, means: Means) -> tuple[RankRecord, Placed | None]:
    """Train on this rank, and look where the experts' tensors are."""
    from helpers.training_run import Training

    training = Training(job, means)
    losses, norms = [], []
    for _ in range(job.steps):
        losses.append(training.forward_backward())
        norms.append(training.update())
    record = RankRecord(
        losses=losses, grads=[], grad_norms=norms, weights=training.weights(), logged=[]
    )
    return record, _placed(training) if job.moe.expert_offload == "file" else None


def _placed(training: Any) -> Placed:
    from megatron_moe.experts.offload import ExpertOffload
    from megatron_moe.experts.placement import is_placed

    def count(tensors: list) -> tuple[int, int]:
        return sum(map(is_placed, tensors)), len(tensors)

    experts = [
        parameter
        for chunk in training.ddp
        for name, parameter in chunk.named_parameters()
        if ".experts." in name
    ]
    moments, copies = [], []
    for optimizer in training.optimizer.chained_optimizers:
        for group in optimizer.optimizer.param_groups:
            if not group["is_expert_parallel"]:
                continue
            for main in group["params"]:
                copies.append(main)
                state = optimizer.optimizer.state[main]
                moments += [state["exp_avg"], state["exp_avg_sq"]]
    offload = ExpertOffload.shared(training.job.moe)
    grads = [parameter.main_grad for parameter in experts]
    places = (count(experts), count(grads), count(copies), count(moments))
    return Placed(*places, cache=offload.summary())


CASES = {
    "fp32": (2, {}, Means(layout=Layout(ep=2)), ALL),
    "fp32-distopt": (
        4,
        {},
        Means(layout=Layout(ep=2), distributed_optimizer=True),
        replace(ALL, offload_cache=3),
    ),
    "bf16-recompute": (
        2,
        BF16 | {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        Means(layout=Layout(ep=2)),
        ALL,
    ),
    "bf16-distopt-weights-only": (
        4,
        BF16,
        Means(layout=Layout(ep=2), distributed_optimizer=True),
        replace(ALL, offload_optimizer=False, offload_cache=2),
    ),
}


@pytest.mark.parametrize(("world_size", "model", "means", "moe"), CASES.values(), ids=list(CASES))
def test_training_is_the_same_bit_for_bit(pool, tmp_path, world_size, model, means, moe):
    job = Job(model=MODEL | model, num_sequences=8, steps=3, moe=MoEConfig(expert_gemm="loop"))
    plain = pool.run(train, job, means, world_size=world_size)
    moe = replace(moe, offload_dir=str(tmp_path))
    found = pool.run(train, replace(job, moe=moe), means, world_size=world_size)

    for (ours, placed), (theirs, _) in zip(found, plain, strict=True):
        assert_equal_bits(ours, theirs)
        in_files = moe.offload_optimizer
        assert placed.weights == (4, 4)
        assert placed.main_grads == ((4, 4) if in_files else (0, 4))
        # The fp32 main "copies" of an fp32 model are its weights.
        assert placed.main_copies[0] == (placed.main_copies[1] if in_files or not model else 0)
        assert placed.moments[0] == (placed.moments[1] if in_files else 0)
        assert placed.moments[1] >= 4
        assert placed.cache["hits"] and placed.cache["prefetched_bytes"]
    assert not list(tmp_path.iterdir())


def assert_equal_bits(ours: RankRecord, theirs: RankRecord) -> None:
    assert ours.losses == theirs.losses
    assert ours.grad_norms == theirs.grad_norms
    assert min(theirs.grad_norms) > 0.5, "gradients are to be clipped"
    assert [piece.name for piece in ours.weights] == [piece.name for piece in theirs.weights]
    for a, b in zip(ours.weights, theirs.weights, strict=True):
        assert a.tensor.dtype == b.tensor.dtype and torch.equal(a.tensor, b.tensor), a.name


ELSEWHERE = {
    "fp16-pp-activation": (
        Layout(pp=2, ep=2),
        {
            "fp16": True,
            "params_dtype": torch.float16,
            "recompute_granularity": "selective",
            "recompute_modules": ["moe_act"],
        },
        {},
    ),
    "vpp": (Layout(pp=2, vpp=2, ep=2), {"num_layers": 4}, {}),
    "etp-recompute-experts": (Layout(ep=2, etp=2), {}, {"recompute_experts": True}),
}


@pytest.mark.parametrize(("layout", "model", "moe"), ELSEWHERE.values(), ids=list(ELSEWHERE))
def test_training_is_the_same_in_other_layouts(pool, tmp_path, layout, model, moe):
    job = Job(model=MODEL | model, num_sequences=8, steps=3)
    plain = replace(job, moe=MoEConfig(expert_gemm="loop", **moe))
    files = replace(job, moe=replace(ALL, offload_dir=str(tmp_path), **moe))
    means = Means(layout=layout)
    found, expected = (pool.run(train_run, one, means, world_size=4) for one in (files, plain))
    for ours, theirs in zip(found, expected, strict=True):
        assert_equal_bits(ours, theirs)


def test_overlapping_the_reduction_of_gradients_is_refused(pool, tmp_path):
    job = Job(model=MODEL, moe=replace(ALL, offload_dir=str(tmp_path)))
    with pytest.raises(RankError, match=r"overlap_grad_reduce with expert_offload = 'file'.*drop"):
        pool.run(train, job, Means(layout=Layout(ep=2), overlap=True), world_size=2)


@pytest.mark.parametrize("optimizer", ["distributed", "plain"])
def test_a_checkpoint_knows_nothing_of_files(pool, tmp_path, optimizer):
    loop = ("--moe-grouped-gemm", "--moe-expert-gemm", "loop", "--moe-ffn-hidden-size", "64")
    folder = tmp_path / "files"
    folder.mkdir()
    files = ("--moe-expert-offload", "file", "--moe-offload-dir", str(folder))
    files = (*files, "--moe-offload-cache", "1", "--moe-offload-optimizer")
    plain = SavedRun(layout=Layout(ep=2), flags=loop, optimizer=optimizer)
    offloaded = replace(plain, flags=loop + files)
    first, second = (plain, offloaded) if optimizer == "distributed" else (offloaded, plain)
    losses = pool.run(train_and_save, first, str(tmp_path / "run"), 2, 3)[0]
    assert pool.run(resume, second, str(tmp_path / "run"), 3)[0] == losses[2:]
    assert len(set(losses)) == 5 and not list(folder.iterdir())
