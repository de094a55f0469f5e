"""What Megatron gets wrong about experts in low precision, measured beside ours."""

import torch
from helpers.layout import Layout
from helpers.runs import Job, Means


def test_expert_gradients_after_an_overflow_of_their_own(pool, faults):
    from helpers.scaler_run import Plan, scaler_steps

    job = Job(model={"fp16": True, "params_dtype": torch.float16}, empty_experts=(2, 3), steps=4)
    plan = {"job": job, "means": Means(layout=Layout(ep=2)), "scale": 1024.0, "spoilt": (1,)}
    ours, upstream = (
        pool.run(scaler_steps, Plan(**plan, upstream=which), world_size=2)[0][3]
        for which in (False, True)
    )
    faults.compare(
        "fp16 with expert parallelism: experts' gradients overflow once, and their loss scale "
        "leaves that of the loss",
        measured="an expert's gradient as the optimizer takes it, by what it is, two steps later",
        upstream=[upstream.expert_factor],
        ours=[ours.expert_factor],
        right=[1.0],
        remedy="an overflow anywhere moves all loss scales alike",
        form="{:.2f}",
    )
