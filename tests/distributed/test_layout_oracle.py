"""Any layout, any means: the same training run as one process.

One global batch and one set of weights; compared are the loss, the MoE losses as logged, every
parameter's gradient, the gradient norm and the weights after two optimizer steps. Every legal
layout of up to 4 ranks is run once by a rotating choice of means (dispatcher, expert backend,
recompute, optimizer, overlap), then the awkward jobs on a few layouts. The full product is slow.

Context parallelism is in `test_layer_oracle.py`: Megatron's local attention has none.
"""

from dataclasses import dataclass, replace
from itertools import cycle, product
from typing import Any

import pytest
import torch
from helpers.layout import Layout, legal_layouts
from helpers.runs import Job, Means, Record, assert_same_run, merge, train
from helpers.tolerances import HALF_RUN

from megatron_moe.config import MoEConfig

GROUPED = {"moe_grouped_gemm": True}
GATHER = {"moe_token_dispatcher_type": "allgather"}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
ACTIVATION = SELECTIVE | {"recompute_modules": ["moe_act"]}

MEANS = {
    "alltoall": Means(),
    "alltoall-grouped": Means(model=GROUPED),
    "allgather-recompute": Means(model=GATHER | FULL),
    "allgather-grouped": Means(model=GATHER | GROUPED),
    "alltoall-grouped-selective-distopt": Means(
        model=GROUPED | SELECTIVE, distributed_optimizer=True
    ),
    "allgather-distopt-overlap": Means(model=GATHER, distributed_optimizer=True, overlap=True),
    "alltoall-grouped-overlap": Means(model=GROUPED, overlap=True),
    "alltoall-grouped-distopt-overlap": Means(
        model=GROUPED, distributed_optimizer=True, overlap=True
    ),
    "alltoall-batched-activation": Means(
        model=GROUPED | ACTIVATION, moe={"expert_gemm": "batched"}
    ),
    "allgather-loop-experts": Means(
        model=GATHER | GROUPED, moe={"expert_gemm": "loop", "recompute_experts": True}
    ),
    "alltoall-sequential-experts-distopt": Means(
        moe={"recompute_experts": True}, distributed_optimizer=True
    ),
}


@dataclass(frozen=True)
class Case:
    """A job on a layout by some means; ``reference`` where the one process needs another job."""

    name: str
    world_size: int
    job: Job
    means: Means
    reference: Job | None = None

    def __str__(self) -> str:
        return f"{self.name}-{self.world_size}-{self.means.layout}"


def layouts_without_cp(world_size: int) -> list[Layout]:
    return [layout for layout in legal_layouts(world_size) if layout.cp == 1]


def job_for(layout: Layout) -> Job:
    return Job(model={"num_layers": 4} if layout.pp > 2 else {})


def rotating_cases() -> list[Case]:
    places = [(n, layout) for n in (1, 2, 4) for layout in layouts_without_cp(n)]
    return [
        Case(name, n, job_for(layout), replace(means, layout=layout))
        for (n, layout), (name, means) in zip(places, cycle(MEANS.items()), strict=False)
    ]


def all_cases() -> list[Case]:
    places = [(n, layout) for n in (1, 2, 4) for layout in layouts_without_cp(n)]
    done = {str(case) for case in rotating_cases()}
    cases = [
        Case(name, n, job_for(layout), replace(means, layout=layout))
        for (n, layout), (name, means) in product(places, MEANS.items())
    ]
    return [case for case in cases if str(case) not in done]


EP2 = (2, Layout(ep=2))
EP4 = (4, Layout(ep=4))
TP2 = (2, Layout(tp=2))
PP2_EP2 = (4, Layout(pp=2, ep=2))
TP2_EP2 = (4, Layout(tp=2, ep=2))
TP2_EP4 = (4, Layout(tp=2, ep=4))
TP2_ETP2 = (4, Layout(tp=2, ep=2, etp=2))
ETP2 = (4, Layout(ep=2, etp=2))


def awkward(name: str, job: Job, *places: Any, **means: Any) -> list[Case]:
    """One case a place; the expert backend alternates."""
    backends = cycle([{}, GROUPED])
    return [
        Case(name, n, job, Means(layout=layout, **({"model": model} | means)))
        for (n, layout), model in zip(places, backends, strict=False)
    ]


def options(**model: Any) -> Job:
    return Job(model=model)


def routed(moe: dict[str, Any], **model: Any) -> Job:
    """A job with options of the plugin, several micro-batches, and no balancing but its own."""
    none = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
    return Job(model=none | model, moe=MoEConfig(**moe), num_sequences=8, micro_batch_size=2)


PER_TOKEN = Job(model={"calculate_per_token_loss": True}, masked_tokens=True)
MANY_LOSSES = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
    "moe_aux_loss_coeff": [0.1, 0.05],
    "moe_z_loss_coeff": 0.01,
}
GLOBAL = options(moe_router_load_balancing_type="global_aux_loss")
SIGMOID = options(
    num_moe_experts=8,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_bias_update_rate=0.05,
    moe_router_num_groups=4,
    moe_router_group_topk=2,
    moe_router_topk_scaling_factor=2.5,
)
CAPACITY = {"moe_expert_capacity_factor": 0.75, "moe_router_load_balancing_type": "aux_loss"}
SHARED = options(moe_shared_expert_intermediate_size=8, moe_shared_expert_gate=True)
INTERLEAVED = options(num_layers=4, moe_layer_freq=[0, 1, 1, 1])
KL = routed(
    {
        "balance_losses": ("kl@micro_batch=0.1", "kl@sequence=0.05", "switch@sequence=0.02"),
        "balance_layer_weights": (1.0, 0.5),
    }
)
KL_GLOBAL = replace(routed({"balance_losses": ("kl@global=0.1",)}), num_sequences=4)
TOP_P = routed({"router_choice": "top_p", "router_cut": 0.4, "budget_loss_coeff": 0.1})
THRESHOLD = routed(
    {"router_choice": "threshold", "router_cut": 0.25, "k_max": 4, "target_k": 2.5},
)
EXPERT_CHOICE = {"router_choice": "expert_choice", "allow_future_tokens": True}
LATE = {"capacity_scope": "micro_batch", "drop_order": "prioritised", "min_capacity": 1}
QUANTILE = {"moe_router_load_balancing_type": "quantile_balancing"}
ONE = {"moe_router_topk": 1, "moe_router_pre_softmax": True}
SINKHORN = {"moe_router_load_balancing_type": "sinkhorn"}
CENTRED = replace(SIGMOID, moe=MoEConfig(expert_bias_update="centred"))

AWKWARD = [
    *awkward("topk1", options(moe_router_topk=1, moe_router_pre_softmax=True), EP2, TP2_EP2),
    *awkward("topk4", options(moe_router_topk=4), EP4, TP2_ETP2),
    *awkward("one-expert-a-rank", options(num_moe_experts=2), EP2, PP2_EP2),
    *awkward("empty-expert", Job(empty_experts=(0,)), EP4, TP2_EP2, ETP2),
    *awkward("empty-rank", Job(empty_experts=(2, 3)), EP2, TP2_EP4, ETP2),
    *awkward("empty-rank-overlap", Job(empty_experts=(2, 3)), EP2, TP2_EP2, overlap=True),
    *awkward(
        "gather-overlap",
        Job(steps=4, model=GROUPED),
        (2, Layout()),
        EP2,
        (4, Layout(ep=2)),
        overlap=True,
        distributed_optimizer=True,
    ),
    *awkward("empty-rank-allgather", Job(empty_experts=(0, 1)), TP2_EP2, model=GATHER),
    *awkward("per-token", PER_TOKEN, EP2, TP2, TP2_EP2, PP2_EP2),
    *awkward("per-token-losses", replace(PER_TOKEN, model=PER_TOKEN.model | MANY_LOSSES), TP2_EP2),
    *awkward("padding", Job(model=MANY_LOSSES, padded_tokens=True), EP2, TP2_EP2, TP2_ETP2),
    *awkward(
        "padding-per-token", replace(PER_TOKEN, padded_tokens=True, masked_tokens=False), TP2_EP2
    ),
    *awkward(
        "losses", Job(model=MANY_LOSSES, num_sequences=8, micro_batch_size=2), EP4, TP2_EP2, PP2_EP2
    ),
    *awkward("sigmoid-bias-groups", SIGMOID, EP2, TP2_EP2, PP2_EP2),
    *awkward("shared-gate", SHARED, EP2, TP2_EP2),
    *awkward("drop", options(**CAPACITY), EP4, PP2_EP2, TP2_EP2),
    *awkward("drop-position", options(**CAPACITY, moe_token_drop_policy="position"), EP4, TP2_ETP2),
    *awkward("drop-prioritised", routed(LATE, moe_expert_capacity_factor=0.75), EP2, TP2_EP2),
    *awkward("kl", KL, EP2, TP2_EP2, PP2_EP2),
    *awkward("kl-padding", replace(KL, padded_tokens=True), TP2_EP2),
    *awkward("kl-recompute", KL, TP2_EP2, model=FULL),
    *awkward("switch", routed({"router_choice": "switch"}, **ONE), EP2, TP2_EP2),
    *awkward("gshard", routed({"router_choice": "gshard"}), EP4, TP2_ETP2),
    *awkward("hash", routed({"router_choice": "hash"}), EP2, TP2_EP2),
    *awkward("hash-recompute", routed({"router_choice": "hash"}), TP2_EP2, model=FULL),
    *awkward("top-p", TOP_P, EP2, TP2_EP2, PP2_EP2),
    *awkward("top-p-recompute", TOP_P, TP2_EP2, model=FULL | GATHER),
    *awkward("threshold-padding", replace(THRESHOLD, padded_tokens=True), EP2, TP2_EP2),
    *awkward("quantile", options(moe_aux_loss_coeff=0.0, **QUANTILE), EP2, TP2_EP2, PP2_EP2),
    *awkward("sinkhorn", options(moe_aux_loss_coeff=0.0, **SINKHORN), EP2, TP2_EP2),
    *awkward("expert-choice", routed(EXPERT_CHOICE), EP2, TP2_EP2, PP2_EP2),
    *awkward("expert-choice-padding", replace(routed(EXPERT_CHOICE), padded_tokens=True), TP2_EP2),
    *awkward(
        "expert-choice-sequence",
        routed(EXPERT_CHOICE | {"expert_choice_scope": "sequence"}),
        TP2_ETP2,
    ),
    *awkward("centred-bias", CENTRED, TP2_EP2),
    *awkward("pad", options(**CAPACITY, moe_pad_expert_input_to_capacity=True), EP2, EP4),
    *awkward(
        "plain-bias", options(add_bias_linear=True, gated_linear_unit=False), EP2, TP2_EP2, TP2
    ),
    *awkward("interleaved", INTERLEAVED, (2, Layout(pp=2, vpp=2)), (4, Layout(pp=2, vpp=2, ep=2))),
    *awkward("interleaved-tp", INTERLEAVED, (4, Layout(pp=2, vpp=2, tp=2, ep=2))),
    *[  # the scope is the global batch: one micro-batch here is several there
        Case("global-aux", n, replace(GLOBAL, micro_batch_size=size), Means(layout=layout), one)
        for one in [replace(GLOBAL, micro_batch_size=4)]
        for (n, layout), size in ((EP2, 2), (EP4, 1), (TP2_EP2, 2))
    ],
    *[
        Case("global-kl", n, replace(KL_GLOBAL, micro_batch_size=size), Means(layout=layout), one)
        for one in [replace(KL_GLOBAL, micro_batch_size=4)]
        for (n, layout), size in ((EP2, 2), (EP4, 1), (TP2_EP2, 2))
    ],
]

# Tensor parallelism rounds partial sums to half precision as well, so it is left out.
HALF = [
    *awkward("bf16", options(bf16=True, params_dtype=torch.bfloat16), EP2, EP4, PP2_EP2),
    *awkward("fp16", options(fp16=True, params_dtype=torch.float16), EP2, EP4),
    *awkward(
        "bf16-distopt",
        options(bf16=True, params_dtype=torch.bfloat16),
        EP2,
        EP4,
        distributed_optimizer=True,
        overlap=True,
    ),
]


def fp8(recipe: str, steps: int = 2, **model: Any) -> Job:
    return Job(model=GROUPED | model, moe=MoEConfig(fp8_emulate=recipe), steps=steps)


# What FP8 rounds to must not depend on the layout either. Scales of blocks along the contraction
# do not (here an expert's rows are fewer than a block); those of a whole tensor do unless its rows
# stay together, which is the recipe's own doing; delayed ones are made of all ranks' amaxes. Before
# the first of these the scale is 1, so that gradients must not be scaled by the layout: per token.
DELAYED = fp8("delayed", calculate_per_token_loss=True)
FP8 = [
    *awkward("fp8-blockwise", fp8("blockwise"), EP2, TP2_EP2, ETP2),
    *awkward("fp8-blockwise-again", fp8("blockwise"), EP2, model=FULL),
    *awkward("fp8-mxfp8", fp8("mxfp8"), EP2, PP2_EP2),
    *awkward("fp8-tensorwise", fp8("tensorwise"), (2, Layout()), TP2_EP2),
    # Not with TP: attention is summed in another order there, and sooner or later a value within
    # fp32 rounding of a tie falls to the other side.
    *awkward("fp8-delayed", replace(DELAYED, steps=3), EP2, ETP2, (2, Layout())),
    *awkward("fp8-delayed-again", DELAYED, ETP2, model=SELECTIVE),
]

_references: dict[str, Record] = {}


def run(pool, job: Job, means: Means, world_size: int) -> Record:
    ranks = pool.run(train, job, means, world_size=world_size, timeout=120)
    return merge(ranks, per_token=job.model.get("calculate_per_token_loss", False))


def check(pool, case: Case, scale: float = 1.0) -> None:
    job = case.reference or case.job
    if repr(job) not in _references:
        _references[repr(job)] = run(pool, job, Means(), 1)
    found = run(pool, case.job, case.means, case.world_size)
    assert_same_run(found, _references[repr(job)], scale)


@pytest.mark.parametrize("case", rotating_cases(), ids=str)
def test_every_layout(pool, case):
    check(pool, case)


@pytest.mark.parametrize("case", AWKWARD, ids=str)
def test_awkward_jobs(pool, case):
    check(pool, case)


@pytest.mark.parametrize("case", FP8, ids=str)
def test_emulated_fp8(pool, case):
    check(pool, case)


@pytest.mark.parametrize("case", HALF, ids=str)
def test_half_precision(pool, case):
    check(pool, case, scale=HALF_RUN)


@pytest.mark.slow
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_every_layout_by_all_means(pool, case):
    check(pool, case)
