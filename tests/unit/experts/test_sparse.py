"""2:4 masks against loops, the schedule, SR-STE's decay, and exact zeros under real optimizers."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config import MoEConfig
from megatron_moe.experts.sparse import (
    Sparsity,
    check_inputs,
    follow,
    load_mask,
    make_permanent,
    masked,
    two_of_four,
)
from megatron_moe.experts.sparse_options import sparse_faults
from megatron_moe.mcore.pruning import Pruning

SHAPE = (2, 3, 8)


class Linear(torch.nn.Module):
    """A stacked weight as experts have it, without Megatron."""

    def __init__(self, moe: MoEConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(SHAPE).to(dtype))
        self.register_buffer("mask", torch.ones(SHAPE, dtype=torch.bool))
        self.sparsity = Sparsity(moe)
        self.schedule = SimpleNamespace(finished=0)
        self.config = SimpleNamespace(grad_scale_func=None)
        follow(self, self.schedule)

    def effective(self) -> torch.Tensor:
        return self.sparsity.effective(self.weight, self.mask)

    def end_batch(self, pruning: Pruning) -> None:
        self.schedule.finished += 1
        pruning.end_batch([self])


def options(**changes) -> MoEConfig:
    return MoEConfig(sparse_experts="2:4", **changes)


def mask_by_loops(weight: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(weight, dtype=torch.bool)
    for row, kept in zip(weight.reshape(-1, 4), out.view(-1, 4), strict=True):
        order = sorted(range(4), key=lambda i: (-abs(float(row[i])), i))
        kept[order[:2]] = True
    return out


# Few values, so that ties and zeros are common.
_ROWS = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, 0.5]), min_size=4, max_size=4)


@settings(max_examples=100, deadline=None)
@given(st.lists(_ROWS, min_size=1, max_size=6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_two_largest_of_each_four_ties_to_the_lower_index(rows, dtype):
    weight = torch.tensor(rows, dtype=dtype)
    mask = two_of_four(weight)
    assert torch.equal(mask, mask_by_loops(weight))
    assert (mask.sum(-1) == 2).all()
    least_kept = weight.abs().masked_fill(~mask, torch.inf).amin(-1)
    most_left = weight.abs().masked_fill(mask, -1.0).amax(-1)
    assert (least_kept >= most_left).all()


def test_groups_are_of_consecutive_inputs():
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0, 1.0, 2.0, -3.0, -4.0]])
    assert two_of_four(weight).int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 1]]


def test_the_gradient_goes_straight_through():
    weight = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    mask = two_of_four(weight)
    x, upstream = torch.randn(5, 8).double(), torch.randn(2, 5, 3).double()
    effective = masked(weight, mask)
    assert torch.equal(effective, weight.detach() * mask)
    (torch.einsum("rd,efd->erf", x, effective) * upstream).sum().backward()
    expected = torch.einsum("erf,rd->efd", upstream, x)
    assert torch.equal(weight.grad, expected) and (weight.grad[~mask] != 0).all()


def test_a_weight_outside_of_the_mask_may_be_infinite():
    weight = torch.tensor([[1.0, torch.inf, 2.0, 3.0]])
    mask = torch.tensor([[True, False, True, False]])
    assert masked(weight, mask).tolist() == [[1.0, 0.0, 2.0, 0.0]]


def test_one_mask_for_each_global_batch():
    linear, pruning = Linear(options()), Pruning()
    first = two_of_four(linear.weight)
    linear.effective().sum().backward()
    with torch.no_grad():
        linear.weight.copy_(linear.weight.flip(-1))
    linear.effective().sum().backward()  # another micro-batch
    assert torch.equal(linear.mask, first)
    linear.end_batch(pruning)
    linear.effective()
    assert torch.equal(linear.mask, two_of_four(linear.weight))
    assert not torch.equal(linear.mask, first)


def test_dense_before_the_start():
    linear, pruning = Linear(options(sparse_start_iter=2)), Pruning()
    for _ in range(2):
        assert linear.effective() is linear.weight
        assert linear.mask.all()
        linear.weight.grad = torch.zeros(SHAPE)
        linear.end_batch(pruning)
        assert not linear.weight.grad.any(), "no decay of dense weights"
    assert torch.equal(linear.effective(), linear.weight * mask_by_loops(linear.weight))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("loss_scale", [None, 1024.0])
def test_decay_is_added_once_for_a_global_batch(micro_batches, loss_scale):
    decay = 0.125
    linear, pruning = Linear(options(sparse_decay=decay)), Pruning()
    scale = loss_scale or 1.0
    if loss_scale:
        linear.config.grad_scale_func = lambda loss: loss_scale * loss
    for _ in range(micro_batches):
        (linear.effective().sum() * scale / micro_batches).backward()
    linear.end_batch(pruning)
    weight, mask = linear.weight.detach(), mask_by_loops(linear.weight.detach())
    for e, f, d in product(*map(range, SHAPE)):
        expected = scale * (1.0 + (0.0 if mask[e, f, d] else decay * float(weight[e, f, d])))
        assert float(linear.weight.grad[e, f, d]) == pytest.approx(expected, rel=1e-6)


def test_gradients_outside_of_a_frozen_mask_are_zero():
    """Before the optimizer: they are to be in no gradient norm."""
    linear, pruning = Linear(options(sparse_freeze_iter=0, sparse_decay=1.0)), Pruning()
    linear.effective().sum().backward()
    linear.end_batch(pruning)
    assert torch.equal(linear.weight.grad, linear.mask.float())


def test_main_grad_takes_precedence_over_grad():
    linear, pruning = Linear(options(sparse_decay=1.0)), Pruning()
    linear.effective().sum().backward()
    linear.weight.main_grad = torch.zeros(SHAPE)
    linear.end_batch(pruning)
    assert torch.equal(linear.weight.main_grad, (linear.weight * ~linear.mask).detach())
    assert torch.equal(linear.weight.grad, torch.ones(SHAPE))


def train(linear: Linear, pruning: Pruning, optimizer: torch.optim.Optimizer, steps: int):
    """Train to fit a drifting target, so that every weight always has a gradient."""
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        ((linear.effective() - torch.randn(SHAPE)) ** 2).sum().backward()
        linear.end_batch(pruning)
        optimizer.step()
        yield


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_frozen_weights_outside_are_zero_after_each_step(make):
    linear, pruning = Linear(options(sparse_freeze_iter=3)), Pruning()
    optimizer = make([linear.weight])
    for step, _ in enumerate(train(linear, pruning, optimizer, 6), start=1):
        mask = linear.mask.clone()
        outside = linear.weight.detach()[~mask]
        if step < 3:
            assert (outside != 0).any()
            continue
        assert not outside.any(), f"step {step}"
        assert (linear.weight[mask] != 0).all()
        moments = [v for v in optimizer.state[linear.weight].values() if v.numel() > 1]
        assert moments and not any(m[~mask].any() for m in moments)
        if step > 3:
            assert torch.equal(mask, frozen)  # noqa: F821
            assert not torch.equal(linear.weight, before)  # noqa: F821
        frozen, before = mask, linear.weight.detach().clone()  # noqa: F841


def test_a_group_of_the_effective_weight_never_has_more_than_two():
    linear, pruning = Linear(options(sparse_decay=0.01)), Pruning()
    seen = set()
    for _ in train(linear, pruning, torch.optim.Adam([linear.weight], lr=0.3), 5):
        linear.mask.fill_(True)  # whatever was there
        nonzero = (linear.effective().view(-1, 4) != 0).sum(-1)
        assert (nonzero <= 2).all()
        seen.add(tuple(linear.mask.flatten().tolist()))
    assert len(seen) > 1, "masks should move before they are frozen"


def test_the_fp32_copy_of_a_half_precision_weight_is_cleared_too():
    linear, pruning = Linear(options(sparse_freeze_iter=1), torch.bfloat16), Pruning()
    main = linear.weight.detach().float().requires_grad_()
    linear.weight.main_param = main
    optimizer = torch.optim.AdamW([main], lr=0.1)
    for _ in range(3):
        linear.weight.grad = None
        linear.effective().float().square().sum().backward()
        linear.end_batch(pruning)
        main.grad = linear.weight.grad.float() + 1.0  # not even a gradient moves them
        optimizer.step()
        assert not main[~linear.mask].any() and main[linear.mask].all()


def test_other_weights_of_the_optimizer_are_left_alone():
    linear, pruning = Linear(options(sparse_freeze_iter=0)), Pruning()
    other = torch.nn.Parameter(torch.randn(SHAPE))
    other.grad = torch.ones(SHAPE)
    linear.effective().sum().backward()
    linear.end_batch(pruning)
    torch.optim.SGD([linear.weight, other], lr=0.1).step()
    assert other.all() and not linear.weight[~linear.mask].any()


def test_evaluation_between_batches_changes_nothing():
    runs = []
    for evaluate in (False, True):
        linear, pruning = Linear(options(sparse_freeze_iter=3)), Pruning()
        for _ in train(linear, pruning, torch.optim.Adam([linear.weight], lr=0.1), 5):
            if evaluate:
                with torch.no_grad():
                    linear.effective()
        runs.append((linear.weight.detach(), linear.mask))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def saved(linear: Linear) -> dict:
    linear.sparsity.refresh(linear.weight, linear.mask)
    return {f"fc.mask{i}": one.clone() for i, one in enumerate(linear.mask)}


def test_a_frozen_mask_is_loaded_and_stays():
    """Also where the weights would choose otherwise."""
    first, second = Linear(options()), Linear(options(sparse_freeze_iter=5))
    first.weight.data = first.weight.data.flip(-1)
    second.schedule.finished = 7
    state, errors = saved(first) | {"fc.weight0": 0}, []
    load_mask(second, state, "fc.", errors)
    second.effective()
    assert not errors and state.keys() == {"fc.weight0"}
    assert torch.equal(second.mask, first.mask)
    assert not torch.equal(second.mask, two_of_four(second.weight))


@pytest.mark.parametrize("finished", [2, 7], ids=["sparse", "frozen"])
def test_an_absent_mask_is_made_from_the_weights(finished):
    linear = Linear(options(sparse_freeze_iter=5))
    linear.effective()
    linear.weight.data = linear.weight.data.flip(-1)
    linear.schedule.finished, errors = finished, []
    load_mask(linear, {"fc.weight0": 0}, "fc.", errors)
    linear.effective()
    assert not errors and torch.equal(linear.mask, two_of_four(linear.weight))


def test_a_stacked_mask_is_read_and_a_wrong_shape_is_an_error():
    linear, errors = Linear(options(sparse_freeze_iter=0)), []
    mask = two_of_four(torch.randn(SHAPE))
    load_mask(linear, {"fc.mask": mask}, "fc.", errors)
    linear.effective()
    assert not errors and torch.equal(linear.mask, mask)
    load_mask(linear, {"fc.mask": mask[:1]}, "fc.", errors)
    assert errors == [
        "size mismatch for fc.mask: (1, 3, 8) in the checkpoint, (2, 3, 8) in the model"
    ]


def test_masks_are_left_where_experts_are_dense(caplog):
    linear = Linear(options())
    state, errors = saved(linear) | {"fc.weight0": 0}, []
    linear.sparsity = None
    for _ in range(2):
        load_mask(linear, dict(state), "fc.", errors)
    assert not errors
    said = [r.message for r in caplog.records if "masks" in r.message]
    assert said == ["masks in the checkpoint are left: sparse_experts is none"]


@pytest.mark.parametrize("changes", [{}, {"sparse_start_iter": 9}], ids=["sparse", "dense"])
def test_make_permanent(changes):
    linear, pruning = Linear(options(**changes)), Pruning()
    linear.effective()
    expected = linear.weight.detach() * mask_by_loops(linear.weight.detach())
    make_permanent([linear])
    assert torch.equal(linear.weight, expected)
    mask = linear.mask.clone()
    for _ in train(linear, pruning, torch.optim.AdamW([linear.weight], lr=0.1), 2):
        assert torch.equal(linear.mask, mask) and not linear.weight[~mask].any()


def test_make_permanent_needs_sparse_experts():
    with pytest.raises(ValueError, match="no 2:4 sparse experts here"):
        make_permanent(torch.nn.Linear(4, 4))


def test_inputs_that_are_no_multiple_of_four():
    with pytest.raises(ValueError, match=r"linear_fc2 on this rank \(6\) to be a multiple of 4"):
        check_inputs(6, "linear_fc2 on this rank")


def transformer(**changes):
    base = {
        "hidden_size": 16,
        "ffn_hidden_size": 64,
        "moe_ffn_hidden_size": 32,
        "expert_tensor_parallel_size": 2,
        "moe_grouped_gemm": True,
        "transformer_impl": "local",
    }
    return SimpleNamespace(**base | changes)


FAULTS = [
    ({"moe_grouped_gemm": False}, {}, "needs stacked experts: add --moe-grouped-gemm"),
    ({"transformer_impl": "transformer_engine"}, {}, "use --transformer-impl local"),
    ({}, {"layer_impl": "megatron"}, "moe_layer_impl is megatron: use --moe-layer-impl plugin"),
    ({"hidden_size": 18}, {}, "hidden_size (18) must be a multiple of 4"),
    ({"moe_ffn_hidden_size": 12}, {}, "moe_ffn_hidden_size (12) must be a multiple of 4 times"),
    (
        {"moe_ffn_hidden_size": None, "ffn_hidden_size": 20},
        {},
        "moe_ffn_hidden_size (20) must be a multiple of 4 times expert_tensor_parallel_size (2)",
    ),
    ({}, {"sparse_start_iter": -2}, "sparse_start_iter (-2) must be 0 or more"),
    (
        {},
        {"sparse_start_iter": 5, "sparse_freeze_iter": 4},
        "sparse_freeze_iter (4) must be -1 (never), or not before sparse_start_iter (5)",
    ),
    ({}, {"sparse_freeze_iter": -2}, "sparse_freeze_iter (-2) must be -1 (never)"),
    ({}, {"sparse_decay": -0.5}, "sparse_decay (-0.5) must be 0 or more"),
    ({}, {"sparse_decay": float("nan")}, "sparse_decay (nan) must be 0 or more"),
]


@pytest.mark.parametrize(("changes", "moe", "message"), FAULTS)
def test_faults(changes, moe, message):
    faults = sparse_faults(transformer(**changes), options(**moe))
    assert len(faults) == 1 and message in faults[0]


def test_no_faults():
    good = options(sparse_start_iter=4, sparse_freeze_iter=4, sparse_decay=0.0)
    assert sparse_faults(transformer(), good) == []
    assert sparse_faults(transformer(hidden_size=18, moe_grouped_gemm=False), MoEConfig()) == []


def test_options_that_would_do_nothing():
    (fault,) = sparse_faults(transformer(), MoEConfig(sparse_freeze_iter=7))
    assert fault == (
        "sparse_freeze_iter (7) without sparse_experts does nothing: add --moe-sparse-experts 2:4"
    )
