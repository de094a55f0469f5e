"""Offloaded experts compute what stacked ones do, bit for bit; and what they refuse."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_moe.config import MoEConfig
from megatron_moe.experts import offload as offloads
from megatron_moe.experts.grouped_gemm import grouped_linear
from megatron_moe.experts.offload import ExpertOffload
from megatron_moe.experts.offload_options import offload_faults
from megatron_moe.experts.placement import is_placed

E, D, F = 5, 7, 9  # odd: experts of a stack begin in the middle of cache lines
# Micro-batches: rows of each expert.
ROWS = [[3, 0, 8, 1, 2], [0, 0, 0, 0, 0], [1, 4, 0, 0, 6]]


class Linear(nn.Module):
    """What the offload knows of a stacked linear layer."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def layers(offload: ExpertOffload, count: int, dtype: torch.dtype) -> list[Linear]:
    """Linear layers of ``count`` layers of experts, F wide inside."""
    out = []
    for shape in [(E, F, D), (E, D, F)] * count:
        linear = Linear(offload.store.zeros(shape, dtype))
        linear.weight.data.normal_()
        out.append(linear)
    for first, second in list(pairwise(out))[::2]:
        offload.add_layer(first, second)
    return out


def train(weights, products, x_per_batch, *, main_grads: bool):
    """Two steps of all micro-batches through all layers; everything that can be seen of it."""
    seen = []
    if main_grads:
        for weight in weights:
            weight.main_grad = torch.zeros(weight.shape, dtype=torch.float32)
    for _ in range(2):
        for rows, x in zip(ROWS, x_per_batch, strict=True):
            leaf = x.clone().requires_grad_()
            hidden = leaf
            for product in products:
                hidden = product(hidden, rows).tanh()
            hidden.square().sum().backward()
            seen += [hidden.detach(), leaf.grad]
            if main_grads:
                for weight in weights:
                    if weight.grad is not None:
                        weight.main_grad.add_(weight.grad)
                        weight.grad = None
        offloads.end_batch()
        for weight in weights:
            grad = weight.main_grad if main_grads else weight.grad
            seen.append(grad.clone())
            weight.data.sub_(0.1 * grad)
            grad.zero_()
    return seen + [weight.detach() for weight in weights]


@pytest.mark.parametrize("main_grads", [True, False])
@pytest.mark.parametrize("cached", [1, 2, 4, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_training_is_the_same_bit_for_bit(tmp_path, dtype, cached, main_grads):
    torch.manual_seed(0)
    offload = ExpertOffload(tmp_path, cached)
    linears = layers(offload, 3, dtype)
    x_per_batch = [torch.randn(sum(rows), D, dtype=dtype) for rows in ROWS]
    plain = [nn.Parameter(linear.weight.detach().clone()) for linear in linears]
    expected = train(
        plain,
        [lambda x, rows, w=w: grouped_linear(x, w, rows, "loop") for w in plain],
        x_per_batch,
        main_grads=main_grads,
    )
    found = train(
        [linear.weight for linear in linears],
        [lambda x, rows, one=one: offload.product(one, x, rows) for one in linears],
        x_per_batch,
        main_grads=main_grads,
    )
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    held = offload.cache.capacity
    assert held == cached * 2 * D * F * dtype.itemsize
    assert offload.summary()["held_bytes"] == 0
    assert offload.summary()["misses"] > 0


def test_no_gradient_of_all_experts_is_made(tmp_path):
    offload = ExpertOffload(tmp_path, 1)
    linear = layers(offload, 1, torch.float32)[0]
    linear.weight.main_grad = torch.zeros(E, F, D)
    offload.product(linear, torch.randn(4, D), [0, 4, 0, 0, 0]).sum().backward()
    assert linear.weight.grad is None
    with_gradient = linear.weight.main_grad.flatten(1).count_nonzero(1) > 0
    assert with_gradient.tolist() == [False, True, False, False, False]


def test_rows_made_again_in_backward(tmp_path):
    torch.manual_seed(0)
    offload = ExpertOffload(tmp_path, 2)
    linear = layers(offload, 1, torch.float64)[0]
    rows = ROWS[0]
    x = torch.randn(sum(rows), D, dtype=torch.float64, requires_grad=True)
    results = []
    for plain in (True, False):
        weight = linear.weight
        if plain:
            out = grouped_linear((x, None), weight, rows, "loop", before=lambda a, b: a.tanh())
        else:
            out = offload.product(linear, (x, None), rows, before=lambda a, b: a.tanh())
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, weight))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_backward_begins_with_what_forward_ended_with(tmp_path):
    offload = ExpertOffload(tmp_path, E)  # room for one layer: both its matrices
    first, second, *others = layers(offload, 2, torch.float32)
    x = torch.randn(5, D, requires_grad=True)
    hidden = x
    for linear in (first, second, *others):
        hidden = offload.product(linear, hidden, [1] * E)
    forward = offload.summary()
    # From the third linear layer on, guessed by rows of a micro-batch, of which there was none.
    assert forward["misses"] == 2 and forward["hits"] == 4 * E - 2
    hidden.sum().backward()
    backward = offload.summary()
    assert backward["misses"] == forward["misses"]
    assert backward["hits"] - forward["hits"] == 4 * E


def test_weights_changed_in_place_are_read_again(tmp_path):
    offload = ExpertOffload(tmp_path, E)
    linear = layers(offload, 1, torch.float32)[0]
    x = torch.randn(E, D)
    with torch.no_grad():
        before = offload.product(linear, x, [1] * E)
        linear.weight.mul_(2)  # as torch's own optimizers do
        assert torch.equal(offload.product(linear, x, [1] * E), before * 2)
        linear.weight.data.mul_(2)  # as Megatron's do
        offloads.end_batch()
        assert torch.equal(offload.product(linear, x, [1] * E), before * 4)


def test_a_weight_that_has_left_its_file_is_refused(tmp_path):
    offload = ExpertOffload(tmp_path, 1)
    linear = layers(offload, 1, torch.float32)[0]
    linear.weight.data = linear.weight.data.clone()
    with pytest.raises(ValueError, match=r"a weight has left its file.*activate"):
        offload.product(linear, torch.randn(1, D), [1, 0, 0, 0, 0])


def test_all_layers_of_a_model_share_one(tmp_path):
    moe = MoEConfig(expert_offload="file", offload_dir=str(tmp_path), offload_cache=3)
    one = ExpertOffload.shared(moe)
    assert ExpertOffload.shared(replace(moe)) is one
    assert ExpertOffload.shared(replace(moe, offload_cache=2)) is not one
    assert ExpertOffload.shared(MoEConfig()) is None
    assert one in offloads.live()
    del one
    assert ExpertOffload.shared(moe).num_cached == 3
    assert not is_placed(torch.zeros(4))


GOOD = MoEConfig(expert_offload="file", offload_dir="/somewhere")


def transformer(**changes):
    fields = {"moe_grouped_gemm": True, "transformer_impl": "local"} | changes
    return SimpleNamespace(**fields)


REFUSED = {
    "expert_offload = 'file' needs a folder: add --moe-offload-dir": replace(GOOD, offload_dir=""),
    "offload_cache = 0 must be 1 or more": replace(GOOD, offload_cache=0),
    "expert_gemm = 'batched' needs all experts at once": replace(GOOD, expert_gemm="batched"),
    "fp8_emulate = 'tensorwise' reads all experts' weights": replace(
        GOOD, fp8_emulate="tensorwise"
    ),
    "sparse_experts = '2:4' reads all experts' weights": replace(GOOD, sparse_experts="2:4"),
    "needs the plugin's stacked experts": replace(GOOD, layer_impl="megatron"),
    "offload_dir = '/x' without expert_offload does nothing": MoEConfig(offload_dir="/x"),
    "offload_optimizer = True without expert_offload": MoEConfig(offload_optimizer=True),
}
REFUSED_TRANSFORMERS = {
    "needs the plugin's stacked experts: use": {"moe_grouped_gemm": False},
    "--transformer-impl local": {"transformer_impl": "transformer_engine"},
    "init_model_with_meta_device makes weights without": {"init_model_with_meta_device": True},
    "mtp_use_repeated_layer sums the gradients": {"mtp_use_repeated_layer": True},
}


def test_what_goes_together_is_not_refused():
    assert offload_faults(transformer(), GOOD) == []
    assert offload_faults(transformer(), replace(GOOD, expert_gemm="loop")) == []
    assert offload_faults(transformer(moe_grouped_gemm=False), MoEConfig()) == []


@pytest.mark.parametrize(("message", "moe"), REFUSED.items(), ids=str)
def test_options_that_cannot_work(message, moe):
    (fault,) = offload_faults(transformer(), moe)
    assert message in fault


@pytest.mark.parametrize(("message", "changes"), REFUSED_TRANSFORMERS.items(), ids=str)
def test_models_that_cannot_work(message, changes):
    (fault,) = offload_faults(transformer(**changes), GOOD)
    assert message in fault


def test_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (fault,) = offload_faults(transformer(), GOOD)
    assert "proven on the CPU only" in fault and "--device cpu" in fault
