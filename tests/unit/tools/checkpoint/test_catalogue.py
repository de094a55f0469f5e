"""Every spelling of a parameter is understood, and is the same parameter."""

import pytest

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.model import catalogue
from megatron_moe.tools.checkpoint.model.catalogue import (
    Rule,
    atom_template,
    extra_state_owner,
    parse_dist_key,
    parse_module_key,
)

L = "decoder.layers.3."
# Rule: spellings in modules (local build, Transformer Engine), then in torch_dist.
SPELLINGS = {
    "input_layernorm.weight": (
        ["input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"],
        ["input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"],
    ),
    "input_layernorm.bias": (
        ["input_layernorm.bias", "self_attention.linear_qkv.layer_norm_bias"],
        ["self_attention.linear_qkv.layer_norm_bias"],
    ),
    "pre_mlp_layernorm.weight": (
        ["pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"],
        ["pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"],
    ),
    **{
        name: ([name], [name])
        for name in (
            "self_attention.linear_proj.weight",
            "self_attention.linear_proj.bias",
            "self_attention.linear_qkv.weight",
            "self_attention.linear_qkv.bias",
            "self_attention.q_layernorm.weight",
            "self_attention.k_layernorm.weight",
            "self_attention.linear_q_proj.weight",
            "self_attention.linear_q_down_proj.weight",
            "self_attention.linear_q_up_proj.layer_norm_weight",
            "self_attention.linear_q_up_proj.weight",
            "self_attention.linear_kv_down_proj.weight",
            "self_attention.linear_kv_up_proj.layer_norm_weight",
            "self_attention.linear_kv_up_proj.weight",
            "mlp.linear_fc2.weight",
            "mlp.linear_fc2.bias",
            "mlp.router.weight",
            "mlp.router.bias",
            "mlp.router.expert_bias",
            "mlp.shared_experts.gate_weight",
            "mlp.shared_experts.linear_fc2.weight",
        )
    },
    **{
        name: ([name], [name, f"{name}_w", f"{name}_v"])
        for name in (
            "mlp.linear_fc1.weight",
            "mlp.linear_fc1.bias",
            "mlp.shared_experts.linear_fc1.weight",
        )
    },
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_within_a_layer(name):
    modules, dist = SPELLINGS[name]
    for spelling in modules:
        key = parse_module_key(L + spelling)
        assert (key.rule.name, key.layer, key.expert, key.mtp) == (name, 3, None, False)
        assert atom_template(key, 3) == L + name
        for inner in ("transformer_layer", "mtp_model_layer"):
            key = parse_module_key(f"mtp.layers.1.{inner}.{spelling}")
            assert (key.rule.name, key.layer, key.mtp) == (name, 1, True)
            assert atom_template(key, 1) == f"mtp.layers.1.transformer_layer.{name}"
    for spelling in dist:
        key, stacked = parse_dist_key(L + spelling)
        assert (key.rule.name, key.layer, stacked) == (name, 3, False)
        assert key.half == {"_w": 0, "_v": 1}.get(spelling[-2:])
        key, stacked = parse_dist_key(f"decoder.layers.{spelling}")
        assert (key.rule.name, stacked) == (name, True)
        key, stacked = parse_dist_key(f"mtp.layers.1.transformer_layer.{spelling}")
        assert (key.rule.name, key.layer, key.mtp, stacked) == (name, 1, True, False)


@pytest.mark.parametrize("linear", ["linear_fc1", "linear_fc2"])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_spellings_of_experts(linear, kind):
    name = f"mlp.experts.{linear}.{kind}"
    for spelling, expert, stacked in (
        (f"mlp.experts.local_experts.5.{linear}.{kind}", 5, False),
        (f"mlp.experts.{linear}.{kind}5", 5, False),
        (f"mlp.experts.{linear}.{kind}", 0, True),
    ):
        key = parse_module_key(L + spelling)
        assert (key.rule.name, key.expert, key.stacked) == (name, expert, stacked)
        assert not key.transposed
        assert atom_template(key, 3) == L + name.replace("experts.", "experts.{expert}.")
    for spelling, expert, stacked, half in (
        (f"mlp.experts.experts.{linear}.{kind}", 0, True, None),
        (f"mlp.experts.experts.5.{linear}.{kind}", 5, False, None),
        (f"mlp.experts.experts.5.{linear}.{kind}_v", 5, False, 1),
    ):
        for prefix in (L, "decoder.layers."):
            key, _ = parse_dist_key(prefix + spelling)
            assert (key.rule.name, key.expert, key.stacked) == (name, expert, stacked)
            assert key.half == half


def test_the_grouped_mlp_of_old():
    for number, linear in ((1, "linear_fc1"), (2, "linear_fc2")):
        key = parse_module_key(f"{L}mlp.experts.weight{number}")
        assert key.rule.name == f"mlp.experts.{linear}.weight"
        assert key.stacked and key.transposed


@pytest.mark.parametrize(
    "name",
    [
        "embedding.word_embeddings.weight",
        "embedding.position_embeddings.weight",
        "decoder.final_layernorm.weight",
        "decoder.final_layernorm.bias",
        "output_layer.weight",
    ],
)
def test_names_outside_layers(name):
    assert parse_module_key(name).rule.name == name
    key, stacked = parse_dist_key(name)
    assert (key.rule.name, key.layer, stacked) == (name, None, False)
    assert atom_template(key, None) == name


@pytest.mark.parametrize(
    "name", ["enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight"]
)
def test_names_of_mtp_layers(name):
    for key in (
        parse_module_key(f"mtp.layers.0.{name}"),
        parse_dist_key(f"mtp.layers.0.{name}")[0],
    ):
        assert (key.rule.name, key.rule.scope, key.layer, key.mtp) == (name, "mtp", 0, True)
        assert atom_template(key, 4) == f"mtp.layers.4.{name}"


def test_norms_within_mtp_and_decoder_are_not_mixed_up():
    # A decoder layer has no enorm, an MTP layer no attention of its own.
    assert parse_module_key(f"{L}enorm.weight") is None
    assert parse_module_key("mtp.layers.0.self_attention.linear_qkv.weight") is None


@pytest.mark.parametrize(
    "name", ["decoder.layers.3.mixer.in_proj.weight", "foo", "vision.weight", L]
)
def test_other_names_are_not_understood(name):
    assert parse_module_key(name) is None
    assert parse_dist_key(name) is None


@pytest.mark.parametrize(
    ("key", "owner"),
    [
        (f"{L}self_attention.linear_qkv._extra_state", "self_attention.linear_qkv"),
        (f"{L}mlp.experts.linear_fc1._extra_state3", "mlp.experts.linear_fc1"),
        (f"{L}mlp.experts.local_experts.2.linear_fc1._extra_state", "mlp.experts.linear_fc1"),
        (
            "decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_1.2_4.8",
            "mlp.experts.linear_fc1",
        ),
        (
            "decoder.layers.1.mlp.experts.experts.5.linear_fc2._extra_state/shard_0_1",
            "mlp.experts.linear_fc2",
        ),
        ("mtp.layers.0.transformer_layer.mlp.linear_fc1._extra_state", "mlp.linear_fc1"),
        ("mtp.layers.0.eh_proj._extra_state/shard_0_1", "eh_proj"),
        ("output_layer._extra_state", "output_layer"),
        (f"{L}self_attention.linear_qkv.weight", None),
        ("rng_state/shard_0.0_1.1", None),
    ],
)
def test_extra_states(key, owner):
    assert extra_state_owner(key) == owner


def test_cuts_are_those_of_megatron():
    cuts = {rule.name: rule.cut for rule in catalogue.rules()}
    assert cuts["self_attention.linear_qkv.weight"] == "rows"
    assert cuts["self_attention.linear_proj.weight"] == "columns"
    assert cuts["mlp.experts.linear_fc1.weight"] == "rows"
    assert cuts["mlp.experts.linear_fc2.weight"] == "columns"
    assert cuts["mlp.router.weight"] == cuts["mlp.linear_fc2.bias"] == "none"
    assert cuts["mlp.shared_experts.gate_weight"] == "none"
    assert cuts["mlp.linear_fc1.bias"] == "rows"
    assert cuts["eh_proj.weight"] == "rows"


def test_names_are_unique():
    names = [(rule.scope, rule.name) for rule in catalogue.rules()]
    doubled = {name for name in names if names.count(name) > 1}
    assert not doubled, doubled


class Point:
    """An entry point."""

    name, value = "theirs", "their.module:RULES"

    def __init__(self, loaded):
        self.loaded = loaded

    def load(self):
        return self.loaded


@pytest.fixture
def entry_point(monkeypatch):
    def offer(loaded):
        monkeypatch.setattr(catalogue, "entry_points", lambda group: [Point(loaded)])
        for cached in (catalogue.rules, catalogue._by_name):
            cached.cache_clear()

    yield offer
    monkeypatch.undo()
    for cached in (catalogue.rules, catalogue._by_name):
        cached.cache_clear()


def test_third_parties_add_rules(entry_point):
    entry_point([Rule("mixer.in_proj.weight", "rows")])
    key = parse_module_key("decoder.layers.1.mixer.in_proj.weight")
    assert (key.rule.cut, key.layer) == ("rows", 1)


def test_an_entry_point_of_something_else_is_refused(entry_point):
    entry_point(["mixer.in_proj.weight"])
    with pytest.raises(
        CheckpointError,
        match=r"entry point 'theirs' of megatron_moe\.checkpoint_rules .* must be a list",
    ):
        catalogue.rules()
