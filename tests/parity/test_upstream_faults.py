"""What Megatron's balancing losses get wrong, measured beside ours: rows of the README's table.

    python -m pytest tests/parity -k upstream_faults -rA

prints the table; ``--faults-markdown FILE`` writes it as the README has it. Every test runs both
layers for real, through Megatron's schedule, DDP and ``finalize_model_grads``; what is right comes
from the written formulas in fp64, from counting, or from the same decision made without the cause
of the fault. A test fails when ours is wrong, and when Megatron no longer is.
"""

from dataclasses import replace

import pytest
import torch
from helpers.faults import (
    BIASED,
    NO_LOSS,
    SIGMOID,
    TOP2,
    Step,
    StepRecord,
    balancing,
    error_of,
    logits,
    padding,
    run_both,
    times_true,
    true_router_grad,
)
from helpers.faults_table import MENDED
from helpers.layout import Layout
from helpers.reference_moe import ReferenceRouter, balance_loss, balance_scores, choose
from helpers.tolerances import assert_same

GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 1}


def test_global_loss_over_data_parallel(pool, faults):
    hidden = [[logits(16, 1, 8, seed=rank)] for rank in range(2)]
    step = Step(hidden=hidden, model=balancing("global_aux_loss"))
    true = true_router_grad(step, "global", TOP2, 0.1)
    upstream, ours = run_both(pool, step, world_size=2)
    faults.compare(
        "`global_aux_loss`: gradient 1/DP of the loss",
        measured="router's gradient at DP 2, in true gradients",
        upstream=[times_true(upstream.router_grad, true)],
        ours=[times_true(ours.router_grad, true)],
        right=[1.0],
        form="{:.3f}",
        remedy="one formula; the factor of each rank follows from how gradients are averaged",
    )
    assert error_of(ours.router_grad, true) < 1e-4


@pytest.mark.parametrize("cause", ["group-limited choice", "expert bias"])
def test_loss_of_a_map_not_dispatched(pool, faults, cause):
    if cause == "expert bias":
        bias_E = torch.linspace(0.3, -0.3, 8)
        options = ReferenceRouter(topk=2, score_function="sigmoid", expert_bias_E=bias_E.double())
        model = BIASED
    else:
        bias_E, model = None, GROUPS
        options = ReferenceRouter(topk=2, num_groups=4, group_topk=1)
    step = Step(
        hidden=[[logits(64, 1, 8)]], model=model | balancing("aux_loss"), expert_bias_E=bias_E
    )
    true = true_router_grad(step, "aux", options, 0.1)
    upstream, ours = run_both(pool, step)
    dispatched = choose(step.hidden[0][0].double().flatten(0, 1), options, [True] * 64)[1]
    assert torch.equal(upstream.maps[0], dispatched)
    faults.compare(
        f"balancing loss of a routing that was not carried out ({cause})",
        measured="error of the router's gradient, in true gradients",
        upstream=[error_of(upstream.router_grad, true)],
        ours=[error_of(ours.router_grad, true)],
        right=[0.0],
        form="{:.3f}",
        remedy="the decision is made once and stored; the loss counts that one",
    )


def test_padding_overwrites_local_counts(pool, faults):
    model = balancing("aux_loss") | {"calculate_per_token_loss": True}
    plain = Step(hidden=[[logits(16, 1, 8)]], padding=[[padding(16, 12)]], model=model)
    true = true_router_grad(plain, "aux", TOP2, 0.1)
    times = []
    for layout in (Layout(tp=2), Layout(cp=2)):
        both = run_both(pool, replace(plain, layout=layout), world_size=2)
        times.append([times_true(record.router_grad, true) for record in both])
        assert error_of(both[1].router_grad, true) < 1e-4
    faults.compare(
        "padding mask: the all-reduce overwrites the rank's own token count",
        measured="router's gradient, per-token loss, TP 2 / CP 2, in true gradients",
        upstream=[t[0] for t in times],
        ours=[t[1] for t in times],
        right=[1.0, 1.0],
        form="{:.3f}",
        remedy="counts are summed into their own tensor; one count of valid tokens for all losses",
    )


def test_sigmoid_loss_below_its_floor(pool, faults):
    figures = []
    for level in (-50.0, -120.0):
        hidden = torch.full((16, 1, 8), level - 10)
        hidden[..., :2] = level  # two experts take all
        step = Step(hidden=[[hidden]], model=SIGMOID | balancing("aux_loss"))
        scores = balance_scores(hidden.double().flatten(0, 1), "sigmoid")
        true = float(balance_loss(scores, scores > 0.1, 2))
        both = run_both(pool, step)
        figures.append([record.logged["load_balancing_loss"] for record in both] + [true])
    faults.compare(
        'sigmoid scores: the router can "hack" the balancing loss below its floor of 1',
        measured="loss when 2 of 8 experts take all, logits at -50 / -120",
        upstream=[f[0] for f in figures],
        ours=[f[1] for f in figures],
        right=[f[2] for f in figures],
        form="{:.3f}",
        remedy="scores are normalised in the log domain, without an epsilon",
    )


def test_sequence_loss_and_micro_batch_size(pool, faults):
    hidden, lengths = logits(16, 2, 8), (16, 4)
    model = balancing("seq_aux_loss")
    whole = Step(hidden=[[hidden]], padding=[[padding(16, *lengths)]], model=model)
    apart = Step(
        hidden=[[hidden[:, :1], hidden[:, 1:]]],
        padding=[[padding(16, n) for n in lengths]],
        model=model,
    )
    true = true_router_grad(apart, "aux", TOP2, 0.1)
    one, two = run_both(pool, apart), run_both(pool, whole)
    assert all(error_of(record.router_grad, true) < 1e-4 for record in (*one, two[1]))
    faults.compare(
        "scale of `seq_aux_loss` depends on the micro-batch size (sequences of unequal length)",
        measured="error of the router's gradient at micro-batch size 2, none at 1, "
        "in true gradients",
        upstream=[error_of(two[0].router_grad, true)],
        ours=[error_of(two[1].router_grad, true)],
        right=[0.0],
        form="{:.3f}",
        remedy="every sequence is averaged over its own valid tokens",
    )


def test_z_loss_and_tensor_parallel(pool, faults):
    model = NO_LOSS | {"moe_z_loss_coeff": 0.1}
    step = Step(hidden=[[logits(16, 1, 8)]], padding=[[padding(16, 6)]], model=model)
    true = true_router_grad(step, "z", TOP2, 0.1)
    one = run_both(pool, step)
    two = run_both(pool, replace(step, layout=Layout(tp=2)), world_size=2)
    assert all(error_of(record.router_grad, true) < 1e-4 for record in (*one, two[1]))
    faults.compare(
        "scale of the z-loss depends on TP and CP (padding not spread evenly over ranks)",
        measured="router's gradient at TP 2, exact at TP 1, in true gradients",
        upstream=[times_true(two[0].router_grad, true)],
        ours=[times_true(two[1].router_grad, true)],
        right=[1.0],
        form="{:.3f}",
        remedy="divided by the valid tokens of the whole micro-batch, not of each rank",
    )


def test_global_loss_and_uneven_micro_batches(pool, faults):
    hidden = torch.eye(8).repeat(2, 1).unsqueeze(1) + 0.5 * torch.eye(8).roll(1, 1).repeat(
        2, 1
    ).unsqueeze(1)
    lengths = (16, 8)  # each a whole round of the experts: balanced
    step = Step(
        hidden=[[hidden, hidden]],
        padding=[[padding(16, n) for n in lengths]],
        model=balancing("global_aux_loss"),
    )
    both = run_both(pool, step)
    found = [record.logged["global_load_balancing_loss"] for record in both]
    faults.compare(
        "scale of `global_aux_loss` depends on how padding falls on micro-batches",
        measured="loss of a perfectly balanced router, micro-batches of 16 and 8 valid tokens",
        upstream=[found[0]],
        ours=[found[1]],
        right=[1.0],
        form="{:.3f}",
        remedy="shares are of the global batch's valid tokens, whichever micro-batch has them",
    )


def test_z_loss_of_a_repeated_layer(pool, faults):
    repeated, z_loss = (
        {"mtp_num_layers": 2, "mtp_use_repeated_layer": True},
        {"moe_z_loss_coeff": 0.1},
    )
    step = Step(hidden=[[logits(16, 1, 8)]], model=NO_LOSS | repeated | z_loss, mtp_passes=2)
    true = true_router_grad(step, "z", TOP2, 0.1)
    times = [times_true(record.router_grad, true) for record in run_both(pool, step)]
    balanced = replace(step, model=repeated | balancing("aux_loss"))
    true = true_router_grad(balanced, "aux", TOP2, 0.1)
    assert all(error_of(record.router_grad, true) < 1e-4 for record in run_both(pool, balanced))
    faults.compare(
        "z-loss of a repeated MTP layer counted once for each repetition",
        measured="router's gradient with 2 repetitions, in true gradients "
        "(of a balancing loss: 1 in both)",
        upstream=[times[0]],
        ours=[times[1]],
        right=[1.0],
        form="{:.3f}",
        remedy="one factor, 1/repetitions, for gradient and log of every loss",
    )


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recompute_counts_once(pool, recompute):
    # No row: Megatron once logged losses twice under recompute, and has mended it. Ours must hold.
    model = balancing("aux_loss") | {"moe_z_loss_coeff": 0.1}
    plain = Step(hidden=[[logits(64, 1, 8)]], model=model)
    if recompute == "full":
        options, noise = {"recompute_method": "uniform", "recompute_num_layers": 1}, 0.0
    else:
        options, noise = {"recompute_modules": ["moe"]}, None
    options = model | options | {"recompute_granularity": recompute}
    expected = run_both(pool, plain)[0]
    for found in run_both(pool, replace(plain, model=options, recompute_noise=noise)):
        assert_same(found.logged, expected.logged, "logged")
        assert_same(found.router_grad, expected.router_grad, "router's gradient")


def test_no_balancing(pool, faults):
    hidden = [[logits(16, 1, 8)]]
    silent = "gradient 0, nothing said"
    found = []
    for model in ({}, balancing("none")):
        upstream, ours = run_both(pool, Step(hidden=hidden, model=model, may_raise=True))
        assert upstream.error is None and upstream.router_grad.norm() == 0.0, MENDED
        about = [text for text in upstream.said if "balanc" in text or "aux_loss" in text]
        found.append([str(about) if about else silent, heard(ours)])
    faults.compare(
        "no balancing at all: coefficient 0 by default / coefficient with type `none`",
        measured="the balancing gradient, and what the user is told",
        upstream=[f[0] for f in found],
        ours=[f[1] for f in found],
        right=["warning", "refused"],
        remedy="the first is said once at build, the second is an error that names the option",
    )


def heard(record: StepRecord) -> str:
    """What our layer made of a model without balancing."""
    if record.error is not None:
        named = "MoEConfigError" in record.error and "moe_aux_loss_coeff" in record.error
        return "refused" if named else record.error
    told = [t for t in record.said if t.startswith("megatron_moe") and "no balancing" in t]
    return "warning" if told else "nothing said"
