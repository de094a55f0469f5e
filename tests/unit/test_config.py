"""Faults a user can cause: all at once, each naming option, value, rule and way out."""

from types import SimpleNamespace

import pytest

from megatron_moe.config import REFUSALS, MoEConfig, MoEConfigError, check


def transformer(**changes):
    base = {
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
        "moe_token_dispatcher_type": "alltoall",
        "moe_aux_loss_coeff": 0.01,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": False,
        "moe_router_topk_scaling_factor": None,
        "moe_router_enable_expert_bias": False,
        "moe_expert_capacity_factor": None,
        "moe_pad_expert_input_to_capacity": False,
        "moe_token_drop_policy": "probs",
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "num_layers": 2,
        "mtp_num_layers": None,
        "expert_model_parallel_size": 2,
        "tensor_model_parallel_size": 1,
        "sequence_parallel": False,
        "moe_grouped_gemm": True,
        "transformer_impl": "local",
        "recompute_granularity": None,
        "recompute_modules": None,
    }
    return SimpleNamespace(**base | changes)


def test_a_plain_model_passes():
    check(transformer())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_moe_experts": 7}, r"num_moe_experts \(7\) must be a multiple .* use 6 or 8"),
        ({"moe_router_topk": 9}, r"moe_router_topk \(9\) must be between 1 and .* \(8\)"),
        ({"tensor_model_parallel_size": 2}, r"add --sequence-parallel"),
        (
            {"moe_router_load_balancing_type": "sinkhorn"},
            r"moe_aux_loss_coeff \(0.01\) does nothing",
        ),
        ({"moe_token_dispatcher_type": "flex"}, r"'flex' is not honoured .* alltoall or allgather"),
        ({"moe_router_group_topk": 2}, r"needs moe_router_num_groups \(None\)"),
        (
            {"moe_router_group_topk": 2, "moe_router_num_groups": 4, "moe_router_topk": 3},
            r"moe_router_topk \(3\) must be a multiple of moe_router_group_topk \(2\)",
        ),
        ({"fp8": "hybrid"}, r"fp8 = 'hybrid' needs Transformer Engine's experts: .*--moe-fp8-emul"),
    ],
)
def test_faults(changes, message):
    with pytest.raises(MoEConfigError, match=message):
        check(transformer(**changes))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"moe_grouped_gemm": False}, {"fp8_emulate": "delayed"}, "add --moe-grouped-gemm"),
        ({"transformer_impl": "transformer_engine"}, {"fp8_emulate": "mxfp8"}, "--fp8-format"),
        (
            {"transformer_impl": "transformer_engine", "fp8": "e4m3"},
            {"fp8_emulate": "mxfp8"},
            "beside fp8 or fp4: drop one",
        ),
        ({}, {"fp8_emulate_format": "e4m3"}, "does nothing: add --moe-fp8-emulate"),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
            {"recompute_experts": True},
            "'moe_act' in recompute_modules would compute parts of them three times",
        ),
        (
            {"recompute_granularity": "full"},
            {"recompute_experts": True},
            "drop --moe-recompute-experts",
        ),
    ],
)
def test_faults_of_experts(changes, options, message):
    with pytest.raises(MoEConfigError, match=message):
        check(transformer(**changes), MoEConfig(**options))


def test_interleaved_gates_are_left_to_transformer_engine():
    check(transformer(moe_mlp_glu_interleave_size=32, transformer_impl="transformer_engine"))
    with pytest.raises(MoEConfigError, match=r"moe_mlp_glu_interleave_size \(32\) is honoured by"):
        check(transformer(moe_mlp_glu_interleave_size=32))


def test_fp8_is_left_to_transformer_engine():
    check(transformer(fp8="hybrid", transformer_impl="transformer_engine"))


def test_all_faults_are_listed_at_once():
    with pytest.raises(MoEConfigError) as error:
        check(transformer(num_moe_experts=7, moe_router_topk=9, moe_permute_fusion=True))
    assert len(str(error.value).splitlines()) == 3


def test_every_refusal_names_its_option_and_a_way_out():
    for refusal in REFUSALS:
        assert refusal.option.isidentifier()
        assert len(refusal.way_out) > 5
