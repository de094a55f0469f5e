"""Tensors in files: what is placed, for how long, and what a disk refuses."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_moe.experts.placement import (
    FileStore,
    Placing,
    PlacingBuffers,
    is_placed,
    store_of,
)

BIG = (64, 128)  # of fp32, eight pages


def file_mappings(folder: Path) -> list[str]:
    """Lines of this process's memory map that lie in the folder."""
    return [
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line
    ]


def test_a_placed_tensor_is_an_ordinary_one_that_lies_in_a_file_without_a_name(tmp_path):
    placed = FileStore(tmp_path).zeros(BIG, torch.float32)
    assert placed.is_contiguous() and placed._base is None
    assert torch.equal(placed, torch.zeros(BIG))
    (mapping,) = file_mappings(tmp_path)
    assert "rw-s" in mapping and mapping.endswith("(deleted)")
    assert not list(tmp_path.iterdir())
    parameter = torch.nn.Parameter(placed)
    assert is_placed(parameter) and is_placed(parameter.data) and is_placed(parameter[3, 5:9])
    assert not is_placed(parameter + 1)


def test_the_file_goes_with_the_last_tensor(tmp_path):
    placed = FileStore(tmp_path).zeros(BIG, torch.bfloat16)
    view, address = placed[1:], placed.data_ptr()
    del placed
    assert is_placed(view) and file_mappings(tmp_path)
    del view
    assert not file_mappings(tmp_path)
    somewhere = SimpleNamespace(data_ptr=lambda: address)
    fake = SimpleNamespace(
        device=torch.device("cpu"), numel=lambda: 1, untyped_storage=lambda: somewhere
    )
    assert store_of(fake) is None  # another tensor may get that address


def test_no_elements_need_no_file(tmp_path):
    empty = FileStore(tmp_path).zeros((0, 4), torch.float32)
    assert empty.shape == (0, 4) and not is_placed(empty)


def test_what_is_made_like_a_placed_tensor_is_placed(tmp_path):
    store = FileStore(tmp_path, training_state=True)
    placed = torch.nn.Parameter(store.zeros(BIG, torch.bfloat16))
    placed.data.normal_()
    with Placing():
        made = {
            "zeros_like": torch.zeros_like(placed, memory_format=torch.preserve_format),
            "empty_like": torch.empty_like(placed, dtype=torch.float32),
            "clone": placed.detach().clone(),
            "float": placed.detach().clone().float(),
        }
        ordinary = [torch.zeros(BIG), torch.zeros_like(torch.ones(BIG)), placed.detach() * 2]
        small = torch.zeros_like(placed[0, :8])
        transposed = placed.detach().t().clone()
        with_gradient = placed.clone()
    assert {name: is_placed(tensor) for name, tensor in made.items()} == dict.fromkeys(made, True)
    assert not any(map(is_placed, [*ordinary, small, transposed]))
    (gradient,) = torch.autograd.grad(with_gradient.sum(), placed)
    assert is_placed(with_gradient) and torch.equal(gradient, torch.ones_like(placed))
    assert made["empty_like"].dtype == torch.float32
    assert torch.equal(made["clone"], placed) and torch.equal(made["float"], placed.float())
    assert made["clone"].data_ptr() != placed.data_ptr()
    assert made["zeros_like"].count_nonzero() == 0


def test_float_of_fp32_is_the_tensor_itself(tmp_path):
    placed = FileStore(tmp_path, training_state=True).zeros(BIG, torch.float32)
    with Placing():
        assert placed.float() is placed


def test_without_training_state_only_weights_are_placed(tmp_path):
    placed = FileStore(tmp_path).zeros(BIG, torch.float32)
    with Placing():
        assert not is_placed(torch.zeros_like(placed))


@pytest.mark.parametrize("training_state", [True, False])
@pytest.mark.parametrize("holds_parameters", [True, False])
def test_buffers_of_ddp(tmp_path, training_state, holds_parameters):
    store = FileStore(tmp_path, training_state=training_state)
    buffer = SimpleNamespace(numel=8192, param_data=None)
    with PlacingBuffers(buffer, store, holds_parameters=holds_parameters):
        if holds_parameters:
            buffer.param_data = torch.zeros(8192, dtype=torch.bfloat16)
        buffer.grad_data = torch.zeros(8192, dtype=torch.float32, requires_grad=False)
        other = torch.zeros(9)
    assert buffer.param_data is None or is_placed(buffer.param_data)
    assert is_placed(buffer.grad_data) == training_state
    assert buffer.grad_data.dtype == torch.float32
    assert not is_placed(other)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"moe_offload_dir \(.*no\) must be an existing folder"):
        FileStore(tmp_path / "no")


def test_a_folder_in_which_no_file_can_be_made():
    with pytest.raises(ValueError, match=r"moe_offload_dir \(/proc/self\) .* choose another"):
        FileStore(Path("/proc/self"))


def test_too_little_room_is_said_beforehand(tmp_path, monkeypatch):
    store = FileStore(tmp_path)
    usage = SimpleNamespace(total=9, used=8, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="no room for another 32,768 bytes, 1,000 are free"):
        store.zeros(BIG, torch.float32)


def test_a_disk_that_fills_up_is_an_error_and_not_a_bus_error(tmp_path, monkeypatch):
    def full(descriptor: int, start: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    store = FileStore(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match="no room for another 32,768 bytes"):
        store.zeros(BIG, torch.float32)
