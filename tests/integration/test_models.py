"""Whole models with our layer: Megatron's builders, multi-token prediction, HybridModel."""

from typing import Any

import pytest
from helpers.layout import Layout

STACKED = {"moe_grouped_gemm": True}


def _loss_of(model: Any) -> tuple[float, int]:
    """One forward and backward; the loss, and how many expert parameters got a gradient."""
    import torch

    tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(8).expand_as(tokens)
    loss = model(tokens, positions, None, labels=tokens).mean()
    loss.backward()
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    return float(loss), sum(p.grad is not None for p in experts)


def _moe_layers(model: Any) -> list[str]:
    from megatron.core.transformer.moe.moe_layer import BaseMoELayer

    found = {n: type(m).__module__ for n, m in model.named_modules() if isinstance(m, BaseMoELayer)}
    return [f"{name}={module}" for name, module in found.items()]


def build_gpt(world: Any, layout: Layout, changes: dict) -> tuple:
    from helpers.megatron_world import enter_layout, moe_config
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_moe.mcore.builder import MoEGPTModelBuilder, MoEGPTModelConfig

    enter_layout(layout)
    config = MoEGPTModelConfig(
        transformer=moe_config(layout, **changes),
        vocab_size=32,
        seq_length=8,
        position_embedding_type="rope",
    )
    builder = config.get_builder_cls()
    assert builder is MoEGPTModelBuilder
    model = builder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    return _moe_layers(model), *_loss_of(model)


def build_wrapped(world: Any, option: str) -> str:
    from helpers.megatron_world import enter_layout, moe_config

    from megatron_moe.config import MoEConfigError
    from megatron_moe.mcore.builder import MoEGPTModelBuilder, MoEGPTModelConfig

    enter_layout(Layout())
    config = MoEGPTModelConfig(transformer=moe_config(Layout()), vocab_size=32, seq_length=8)
    try:
        MoEGPTModelBuilder(config).build_distributed_models(pg_collection=None, **{option: True})
    except MoEConfigError as error:
        return str(error)
    return "built"


def build_stacked_in(world: Any, precision: str) -> str:
    from types import SimpleNamespace

    from megatron_moe.config import MoEConfig, MoEConfigError
    from megatron_moe.mcore.specs import build_experts

    fields = {"moe_grouped_gemm": True, "fp8": None, "fp4": None, precision: "e4m3"}
    config = SimpleNamespace(**fields)
    try:
        build_experts(2, config, submodules=None, moe=MoEConfig())
    except MoEConfigError as error:
        return str(error)
    return "built"


@pytest.mark.parametrize("precision", ["fp8", "fp4"])
def test_stacked_experts_do_not_stand_in_for_those_of_transformer_engine(pool, precision):
    (message,) = pool.run(build_stacked_in, precision, world_size=1)
    assert "install 1.11 or newer, or drop --moe-grouped-gemm" in message


@pytest.mark.parametrize("option", ["use_megatron_fsdp", "use_torch_fsdp2"])
def test_wrappers_that_were_never_tried_are_refused(pool, option):
    (message,) = pool.run(build_wrapped, option, world_size=1)
    assert message.startswith(f"{option} with the plugin's experts")
    assert "use --use-distributed-optimizer" in message


@pytest.mark.parametrize("changes", [{}, STACKED], ids=["sequential", "stacked"])
def test_layer_frequency_says_which_layers_are_ours(pool, changes):
    changes = changes | {"num_layers": 3, "moe_layer_freq": [0, 1, 1]}
    for layers, loss, grads in pool.run(build_gpt, Layout(ep=2), changes, world_size=2):
        assert layers == [
            "decoder.layers.1.mlp=megatron_moe.layer",
            "decoder.layers.2.mlp=megatron_moe.layer",
        ]
        assert 0 < loss < 20
        assert grads == (4 if "moe_grouped_gemm" in changes else 8)


def test_multi_token_prediction_layers_are_ours_too(pool):
    changes = STACKED | {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.1}
    for layers, loss, _ in pool.run(build_gpt, Layout(ep=2), changes, world_size=2):
        assert [entry.split("=")[1] for entry in layers] == ["megatron_moe.layer"] * 3
        assert any(entry.startswith("mtp.") for entry in layers)
        assert 0 < loss < 20


def build_hybrid(world: Any, layout: Layout, changes: dict) -> tuple:
    from helpers.megatron_world import enter_layout, moe_config
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from megatron_moe.mcore.specs import hybrid_stack_spec

    enter_layout(layout)
    model = HybridModel(
        config=moe_config(layout, num_layers=4, is_hybrid_model=True, **changes),
        hybrid_stack_spec=hybrid_stack_spec,
        vocab_size=32,
        max_sequence_length=8,
        hybrid_layer_pattern="*E*E",
        position_embedding_type="rope",
    )
    return _moe_layers(model), *_loss_of(model)


@pytest.mark.parametrize("changes", [{}, STACKED], ids=["sequential", "stacked"])
def test_hybrid_model_with_attention_and_our_moe_layers(pool, changes):
    results = pool.run(build_hybrid, Layout(ep=2), changes, world_size=2)
    for layers, loss, grads in results:
        assert [entry.split("=")[1] for entry in layers] == ["megatron_moe.layer"] * 2
        assert 0 < loss < 20
        assert grads == (4 if changes else 8)


def spec_in_an_unpatched_config(world: Any) -> tuple:
    """What ``--spec megatron_moe.mcore.specs gpt_block_spec`` comes to, with Megatron's builder."""
    from helpers.megatron_world import enter_layout, moe_config
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import import_module
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

    layout = Layout(ep=2)
    enter_layout(layout)
    config = GPTModelConfig(
        transformer=moe_config(layout, **STACKED),
        transformer_layer_spec=import_module(["megatron_moe.mcore.specs", "gpt_block_spec"]),
        vocab_size=32,
        seq_length=8,
        position_embedding_type="rope",
    )
    model = GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    return _moe_layers(model), *_loss_of(model)


def test_the_spec_works_with_megatrons_own_builder(pool):
    for layers, loss, grads in pool.run(spec_in_an_unpatched_config, world_size=2):
        assert [entry.split("=")[1] for entry in layers] == ["megatron_moe.layer"] * 2
        assert 0 < loss < 20
        assert grads == 4


def refused(world: Any, changes: dict) -> None:
    build_gpt(world, Layout(), changes)


def test_an_option_that_is_not_honoured_is_refused_by_name(pool):
    changes = {"moe_router_force_biased": 0.5}
    with pytest.raises(AssertionError, match=r"force_biased = 0.5 is not honoured by the plugin"):
        pool.run(refused, changes, world_size=1)
