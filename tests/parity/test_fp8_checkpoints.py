"""What delayed scaling remembers, in checkpoints: Megatron's save and load, and the resharder."""

import re
from dataclasses import replace

import pytest
import torch
from helpers.layout import Layout
from helpers.saved_run import SavedRun, assert_same_losses, iteration_folder, resume, train_and_save

from megatron_moe.tools.checkpoint.plan.compile import compile_plan
from megatron_moe.tools.checkpoint.plan.request import Request, resolve
from megatron_moe.tools.checkpoint.read.open import open_checkpoint
from megatron_moe.tools.checkpoint.write.execute import Options, execute

PLAIN = ("--swiglu", "--disable-bias-linear", "--num-layers", "2", "--moe-grouped-gemm")
DELAYED = (*PLAIN, "--moe-fp8-emulate", "delayed", "--fp8-amax-history-len", "3")
RUN = SavedRun(layout=Layout(ep=2), optimizer="fully", flags=DELAYED, bf16=True)
STATE = re.compile(r"linear_fc[12]\.fp8_(scale|amax_history)\d+$")


@pytest.mark.parametrize("form", ["torch_dist", "torch"])
def test_a_resume_is_exact_and_state_goes_through_the_resharder(pool, tmp_path, form):
    run = replace(RUN, form=form, optimizer="fully" if form == "torch_dist" else "distributed")
    losses = pool.run(train_and_save, run, str(tmp_path / "a"), 2, 2, world_size=2)[0]
    found = pool.run(resume, run, str(tmp_path / "a"), 2, world_size=2)[0]
    assert_same_losses(found, losses[2:], exact=True)

    opened = open_checkpoint(tmp_path / "a")
    wish = Request(tp=1, pp=1, ep=4, etp=1, dp=4, form="torch", optim="dp")
    execute(compile_plan(opened, resolve(opened, wish)), tmp_path / "b", Options())
    states = [
        torch.load(path, weights_only=False)["model"]
        for path in sorted(iteration_folder(tmp_path / "b").rglob("model_optim_rng.pt"))
    ]
    scales = [value for state in states for key, value in state.items() if STATE.search(key)]
    assert len(scales) == 2 * 2 * 2 * 4, "layers, linear layers, tensors, experts"
    learned = [value for value in scales if value.shape == (3,) and bool((value != 1).any())]
    assert len({str(value.tolist()) for value in learned}) > 8, "each expert has its own"


def test_emulation_may_begin_with_a_plain_checkpoint_and_end_again(pool, tmp_path):
    plain = replace(RUN, flags=PLAIN)
    for before, after, folder in ((plain, RUN, "plain"), (RUN, plain, "delayed")):
        losses = pool.run(train_and_save, before, str(tmp_path / folder), 1, 1, world_size=2)[0]
        found = pool.run(resume, after, str(tmp_path / folder), 1, world_size=2, strict=False)[0]
        assert found[0] != losses[1]
