"""The layer alone in fp64, on any layout, against loops over tokens and experts.

Here are the cases that a whole model cannot show on a CPU: context parallelism, another number of
tokens on every data-parallel rank, a rank without any token.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers.layers import LayerJob, merge_layer, random_batches, reference_layer, run_layer
from helpers.layout import Layout
from helpers.reference_moe import ReferenceRouter
from helpers.strategies import layouts, uneven_lengths
from helpers.tolerances import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

GATHER = {"moe_token_dispatcher_type": "allgather"}
GROUPED = {"moe_grouped_gemm": True}
LOSSES = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
    "moe_aux_loss_coeff": [0.1, 0.05],
    "moe_z_loss_coeff": 0.01,
}
COEFFS = {"aux_loss": 0.1, "seq_aux_loss": 0.05, "z_loss": 0.01}
LOG_NAMES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "z_loss": "z_loss",
}


@dataclass(frozen=True)
class Case:
    """Sequence lengths by data-parallel rank, on a layout; padding in the last tokens if asked."""

    name: str
    world_size: int
    layout: Layout
    lengths: tuple[int, ...]
    model: dict[str, Any] = field(default_factory=dict)
    router: ReferenceRouter = field(default_factory=lambda: ReferenceRouter(topk=2))
    padded: bool = False
    empty_experts: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}-{self.world_size}-{self.layout}"


def routed(**options: Any) -> tuple[dict[str, Any], ReferenceRouter]:
    """The same options for Megatron's configuration and for the reference."""
    model = {f"moe_router_{name}": value for name, value in options.items()}
    return model, ReferenceRouter(**({"topk": 2} | options))


DROP, DROP_POSITION = (
    ReferenceRouter(topk=2, capacity_factor=0.5, drop_policy=policy)
    for policy in ("probs", "position")
)
CAPACITY = {"moe_expert_capacity_factor": 0.5}
ONE, ONE_REFERENCE = routed(topk=1, pre_softmax=True)

CASES = [
    Case("one", 1, Layout(), (5,)),
    Case("one-grouped", 1, Layout(), (5,), GROUPED),
    Case("one-allgather", 1, Layout(), (5,), GATHER),
    Case("cp", 2, Layout(cp=2), (6,)),
    Case("cp", 2, Layout(cp=2, ep=2), (6,), GROUPED),
    Case("cp", 4, Layout(cp=2, ep=4), (6, 6)),
    Case("cp-allgather", 4, Layout(cp=2, ep=2), (6, 6), GATHER),
    Case("cp", 4, Layout(cp=2, tp=2, ep=2), (8,), GROUPED),
    Case("cp", 4, Layout(cp=2, tp=2, ep=2, etp=2), (8,)),
    Case("cp-padding", 4, Layout(cp=2, tp=2, ep=4), (8,), padded=True),
    Case("uneven", 2, Layout(ep=2), (3, 6)),
    Case("uneven", 4, Layout(ep=4), (1, 5, 2, 4), GROUPED),
    Case("uneven-allgather", 4, Layout(ep=4), (1, 5, 2, 4), GATHER),
    Case("uneven", 4, Layout(tp=2, ep=4), (2, 6)),
    Case("uneven", 4, Layout(ep=2, etp=2), (1, 5, 2, 4)),
    Case("no-tokens", 2, Layout(ep=2), (0, 4)),
    Case("no-tokens", 4, Layout(ep=4), (0, 3, 0, 2), GROUPED),
    Case("no-tokens-allgather", 4, Layout(ep=2), (4, 0, 0, 0), GATHER),
    Case("no-tokens", 4, Layout(ep=2, etp=2), (0, 2, 0, 3), GROUPED),
    Case("nobody", 2, Layout(ep=2), (0, 0)),
    Case("empty-experts", 4, Layout(ep=2), (2, 3, 1, 4), GROUPED, empty_experts=(2, 3)),
    Case("empty-experts", 4, Layout(ep=4), (2, 3, 1, 4), empty_experts=(0,)),
    Case("padding", 2, Layout(ep=2), (4, 5), padded=True),
    Case("padding-allgather", 4, Layout(ep=4), (4, 5, 3, 4), GATHER | GROUPED, padded=True),
    Case("topk1", 4, Layout(ep=2), (2, 3, 1, 4), ONE, ONE_REFERENCE),
    Case("drop", 4, Layout(ep=4), (4, 5, 3, 4), CAPACITY, DROP),
    Case(
        "drop-position",
        2,
        Layout(ep=2),
        (4, 5),
        CAPACITY | {"moe_token_drop_policy": "position"},
        DROP_POSITION,
    ),
    Case("drop-padding", 2, Layout(ep=2), (4, 5), CAPACITY | GROUPED, DROP, padded=True),
]


def job_of(case: Case) -> LayerJob:
    batches = random_batches(list(case.lengths))
    padding = None
    if case.padded:
        keep = [max(1, n - 1 - i % 2) for i, n in enumerate(case.lengths)]
        rows = [torch.arange(n) >= k for n, k in zip(case.lengths, keep, strict=True)]
        padding = [torch.stack([row, torch.zeros_like(row)]) for row in rows]
    if case.empty_experts:
        for batch in batches["batches"]:
            batch[..., 0] = 1.0  # the feature by which the router's weight rules them out
    model = LOSSES | case.model
    return LayerJob(model=model, padding=padding, empty_experts=case.empty_experts, **batches)


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    """Any layout of 4 ranks without pipeline, any lengths, any choice among the common options."""
    layout = draw(layouts(4).filter(lambda layout: layout.pp == 1))
    sharing = layout.tp * layout.cp
    topk = draw(st.integers(1, 4))
    options, router = routed(
        topk=topk,
        pre_softmax=topk == 1 or draw(st.booleans()),
        score_function=draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])),
    )
    means = draw(st.sampled_from([{}, GATHER])) | draw(st.sampled_from([{}, GROUPED]))
    lengths = draw(uneven_lengths(4 // sharing, multiple=sharing))
    empty = draw(st.sampled_from([(), (0,), (2, 3)])) if topk <= 2 else ()
    return Case("drawn", 4, layout, lengths, options | means, router, empty_experts=empty)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_equals_the_loop(pool, case):
    check(pool, case)


@settings(max_examples=25, derandomize=True)
@given(case=drawn_cases())
def test_drawn_layers_equal_the_loop(pool, case):
    check(pool, case)


def check(pool, case: Case) -> None:
    job = job_of(case)
    found = merge_layer(pool.run(run_layer, job, case.layout, world_size=case.world_size))
    expected = reference_layer(job, case.router, COEFFS)
    assert_same(dict(enumerate(found.outputs)), dict(enumerate(expected.outputs)), "output")
    assert_same(
        dict(enumerate(found.input_grads)), dict(enumerate(expected.input_grads)), "input gradient"
    )
    assert_same(found.grads, expected.grads, "gradient")
    logged = {LOG_NAMES[name]: value for name, value in expected.logged.items()}
    losses = {name: value for name, value in found.logged.items() if name in logged}
    assert_same(losses, logged, "logged")
