"""What the patches of Megatron's optimizers do around an optimizer, without Megatron."""

from types import SimpleNamespace

import pytest
import torch

from megatron_moe.experts.offload import ExpertOffload
from megatron_moe.experts.placement import FileStore, is_placed
from megatron_moe.patches.megatron import place_offloaded as patches

BIG = (64, 64)


def test_state_that_a_checkpoint_brought_is_moved_into_files(tmp_path):
    store = FileStore(tmp_path, training_state=True)
    placed, ordinary = torch.nn.Parameter(store.zeros(BIG, torch.float32)), torch.ones(BIG)
    moment = torch.randn(BIG)
    state = {
        placed: {"step": torch.tensor(3.0), "exp_avg": moment.clone(), "other": None},
        ordinary: {"exp_avg": moment.clone()},
    }
    seen = []

    def step(optimizer: SimpleNamespace) -> bool:
        seen.append(is_placed(torch.zeros_like(placed)))
        return True

    optimizer = SimpleNamespace(
        optimizer=SimpleNamespace(state=state), get_parameters=lambda: list(state)
    )
    assert patches._step(step, optimizer)
    assert is_placed(state[placed]["exp_avg"]) and torch.equal(state[placed]["exp_avg"], moment)
    assert state[placed]["step"].item() == 3 and not is_placed(state[ordinary]["exp_avg"])
    assert seen == [True] and not is_placed(torch.zeros_like(placed))


def test_without_offloaded_experts_nothing_is_placed():
    parameter = torch.nn.Parameter(torch.zeros(BIG))
    optimizer = SimpleNamespace(get_parameters=lambda: [parameter])
    assert patches._step(lambda optimizer: True, optimizer)
    stub = SimpleNamespace(is_stub_optimizer=True)
    assert patches._prepare(lambda optimizer: "original", stub) == "original"


@pytest.mark.parametrize(
    ("config", "ddp", "message"),
    [
        ({"optimizer_cpu_offload": True}, {}, "optimizer_cpu_offload with expert_offload = 'file'"),
        ({}, {"use_megatron_fsdp": True}, "use_megatron_fsdp with expert_offload = 'file'"),
    ],
)
def test_what_moves_the_same_state_is_refused(tmp_path, config, ddp, message):
    chunk = torch.nn.Linear(1, 1)
    chunk.offload = ExpertOffload(tmp_path, 1)
    chunk.ddp_config = SimpleNamespace(**ddp)
    with pytest.raises(ValueError, match=message):
        patches._make_optimizer(lambda *args: None, SimpleNamespace(**config), [chunk])
    del chunk.offload
    assert patches._make_optimizer(lambda *args: 7, SimpleNamespace(**config), [chunk]) == 7
