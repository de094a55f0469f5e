"""The table of what a Megatron model is made of: one rule a parameter, in registration order.

A rule says how a parameter is cut over tensor-parallel ranks and by what other names it goes: the
name of the module when a norm is fused into the linear layer after it (Transformer Engine), the
key in ``torch_dist``. Order matters: optimizers number parameters, and flat buffers lay them out,
in the order in which modules register them.

A third party adds rules for its own architecture by an entry point of the group
``megatron_moe.checkpoint_rules``, a list of :class:`Rule` (see ``docs/checkpoints.md``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Literal

from megatron_moe.tools.checkpoint.errors import CheckpointError

Cut = Literal["none", "rows", "columns", "unknown"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One parameter (or saved buffer) of a module.

    Args:
        name: Within its layer, or within the model for ``outer`` rules.
        cut: Over tensor-parallel ranks: ``rows`` dimension 0, ``columns`` dimension 1, ``none``
            for replicas, ``unknown`` where it depends on the build (then only `torch_dist` to
            `torch_dist` is possible).
        fused: Name in a module built with Transformer Engine, where a norm is part of the linear
            layer behind it.
        gated: May hold gate ‖ linear along dimension 0.
        buffer: Saved, but not trained: in no optimizer.
        vocabulary: Dimension 0 is the padded vocabulary.
        scope: ``layer``, ``mtp`` (of an MTP layer beside its transformer layer) or ``outer``.
    """

    name: str
    cut: Cut = "none"
    fused: str | None = None
    gated: bool = False
    buffer: bool = False
    vocabulary: bool = False
    scope: Literal["layer", "mtp", "outer"] = "layer"

    @property
    def cut_dim(self) -> int | None:
        """Dimension that is cut; None where every rank has all of it."""
        return {"rows": 0, "columns": 1}.get(self.cut)


def _norm(name: str, fused: str | None = None, scope: Literal["layer", "mtp", "outer"] = "layer"):  # type: ignore[no-untyped-def]
    return [
        Rule(f"{name}.{kind}", fused=f"{fused}_{kind}" if fused else None, scope=scope)
        for kind in ("weight", "bias")
    ]


_ATTENTION = [
    *_norm("input_layernorm", "self_attention.linear_qkv.layer_norm"),
    Rule("self_attention.linear_proj.weight", "columns"),
    Rule("self_attention.linear_proj.bias"),
    Rule("self_attention.linear_qkv.weight", "rows"),
    Rule("self_attention.linear_qkv.bias", "rows"),
    *_norm("self_attention.q_layernorm"),
    *_norm("self_attention.k_layernorm"),
    # Multi-latent attention.
    Rule("self_attention.linear_q_proj.weight", "rows"),
    Rule("self_attention.linear_q_down_proj.weight", "unknown"),
    Rule("self_attention.linear_q_up_proj.layer_norm_weight"),
    Rule("self_attention.linear_q_up_proj.layer_norm_bias"),
    Rule("self_attention.linear_q_up_proj.weight", "rows"),
    Rule("self_attention.linear_kv_down_proj.weight", "unknown"),
    Rule("self_attention.linear_kv_up_proj.layer_norm_weight"),
    Rule("self_attention.linear_kv_up_proj.layer_norm_bias"),
    Rule("self_attention.linear_kv_up_proj.weight", "rows"),
    *_norm("self_attention.kv_layernorm"),
]
_FEED_FORWARD = [
    *_norm("pre_mlp_layernorm", "mlp.linear_fc1.layer_norm"),
    Rule("mlp.linear_fc1.weight", "rows", gated=True),
    Rule("mlp.linear_fc1.bias", "rows", gated=True),
    Rule("mlp.linear_fc2.weight", "columns"),
    Rule("mlp.linear_fc2.bias"),
    Rule("mlp.router.weight"),
    Rule("mlp.router.bias"),
    Rule("mlp.router.expert_bias", buffer=True),
    Rule("mlp.router.local_tokens_per_expert", buffer=True),
    *(
        Rule(f"mlp.router.{name}", buffer=True)
        for name in (
            "qb_beta",
            "choice_cut",
            "routing_step",
            "probe_inputs",
            "probe_ring",
            "probe_count",
            "context_tags",
            "context_experts",
        )
    ),
    Rule("mlp.experts.linear_fc1.weight", "rows", gated=True),
    Rule("mlp.experts.linear_fc1.bias", "rows", gated=True),
    Rule("mlp.experts.linear_fc2.weight", "columns"),
    Rule("mlp.experts.linear_fc2.bias"),
    Rule("mlp.experts.linear_fc1.mask", "rows", gated=True, buffer=True),
    Rule("mlp.experts.linear_fc2.mask", "columns", buffer=True),
    *(
        Rule(f"mlp.experts.linear_{fc}.{name}", buffer=True)
        for fc in ("fc1", "fc2")
        for name in ("fp8_scale", "fp8_amax_history")
    ),
    Rule("mlp.shared_experts.gate_weight"),
    Rule("mlp.shared_experts.linear_fc1.weight", "rows", gated=True),
    Rule("mlp.shared_experts.linear_fc1.bias", "rows", gated=True),
    Rule("mlp.shared_experts.linear_fc2.weight", "columns"),
    Rule("mlp.shared_experts.linear_fc2.bias"),
]
_MTP = [
    *_norm("enorm", scope="mtp"),
    *_norm("hnorm", scope="mtp"),
    Rule("eh_proj.weight", "rows", scope="mtp"),
    *_norm("final_layernorm", scope="mtp"),
]
_OUTER = [
    Rule("embedding.word_embeddings.weight", "rows", vocabulary=True, scope="outer"),
    Rule("embedding.position_embeddings.weight", scope="outer"),
    *_norm("decoder.final_layernorm", scope="outer"),
    Rule("output_layer.weight", "rows", vocabulary=True, scope="outer"),
    Rule("output_layer.bias", "rows", vocabulary=True, scope="outer"),
]
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_ENTRY_POINTS = "megatron_moe.checkpoint_rules"


@cache
def rules() -> tuple[Rule, ...]:
    """Return every rule, in registration order, third parties' last.

    Raises:
        CheckpointError: An entry point gives something else than rules.
    """
    found = [*_ATTENTION, *_FEED_FORWARD, *_MTP, *_OUTER]
    for point in entry_points(group=_ENTRY_POINTS):
        extra = point.load()
        if not all(isinstance(rule, Rule) for rule in extra):
            raise CheckpointError(
                f"entry point {point.name!r} of {_ENTRY_POINTS} ({point.value}) must be a list of "
                "megatron_moe.tools.checkpoint.model.catalogue.Rule"
            )
        found += extra
    return tuple(found)


@cache
def _buffer_endings() -> tuple[str, ...]:
    names = (rule.name.removeprefix("mlp.experts.") for rule in rules() if rule.buffer)
    return tuple(f".{name}{half}" for name in names for half in ("", ".gate", ".up"))


def is_buffer(atom: str) -> bool:
    """Whether an atom of this name is saved, but not trained."""
    return atom.endswith(_buffer_endings())


@cache
def _by_name(scope: str) -> dict[str, Rule]:
    names: dict[str, Rule] = {}
    for rule in rules():
        if rule.scope == scope:
            names[rule.name] = rule
            if rule.fused:
                names[rule.fused] = rule
    return names


@dataclass(frozen=True, slots=True)
class Key:
    """A state-dict key understood.

    Args:
        rule: What it is.
        layer: Its layer: local to the chunk in legacy files; None outside layers.
        mtp: Whether ``layer`` counts MTP layers.
        expert: First expert it holds, local to the rank; None outside experts.
        stacked: Dimension 0 counts experts.
        transposed: The legacy GroupedMLP: a view ``(e, in, out)``.
        half: 0 gate, 1 linear, where a key holds only one.
    """

    rule: Rule
    layer: int | None = None
    mtp: bool = False
    expert: int | None = None
    stacked: bool = False
    transposed: bool = False
    half: int | None = None


_DECODER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_MTP_INNER = re.compile(r"mtp\.layers\.(\d+)\.(?:transformer_layer|mtp_model_layer)\.(.+)")
_MTP_OUTER = re.compile(r"mtp\.layers\.(\d+)\.(.+)")
_IN_EXPERT = r"(linear_fc[12]\.(?:weight|bias|mask|fp8_scale|fp8_amax_history))"
_SEQUENTIAL = re.compile(r"mlp\.experts\.local_experts\.(\d+)\." + _IN_EXPERT)
_GROUPED = re.compile(rf"mlp\.experts\.{_IN_EXPERT}(\d+)")
_STACKED = re.compile(rf"mlp\.experts\.{_IN_EXPERT}")
_GROUPED_MLP = {"mlp.experts.weight1": "fc1", "mlp.experts.weight2": "fc2"}
_EXTRA = re.compile(r"\._extra_state\d*(/|$)")
_LAYER_PREFIX = re.compile(
    r"^(decoder\.layers\.(\d+\.)?|mtp\.layers\.\d+\.((transformer_layer|mtp_model_layer)\.)?)"
)
_EXPERT_INSIDE = re.compile(r"mlp\.experts\.(experts\.(\d+\.)?|local_experts\.\d+\.)")


def extra_state_owner(key: str) -> str | None:
    """Return the module, within its layer, whose FP8 state (mostly empty) a key holds.

    Returns:
        ``self_attention.linear_qkv``, ``mlp.experts.linear_fc1``, ``output_layer``, ...; None for
        other keys.
    """
    found = _EXTRA.search(key)
    if not found:
        return None
    name = _LAYER_PREFIX.sub("", key[: found.start()], count=1)
    return _EXPERT_INSIDE.sub("mlp.experts.", name)


def _in_layer(name: str) -> Key | None:
    """Understand the name of a parameter within a layer of a module."""
    names = _by_name("layer")
    if found := _SEQUENTIAL.fullmatch(name):
        return Key(names[f"mlp.experts.{found[2]}"], expert=int(found[1]))
    if found := _GROUPED.fullmatch(name):
        return Key(names[f"mlp.experts.{found[1]}"], expert=int(found[2]))
    if found := _STACKED.fullmatch(name):
        return Key(names[name], expert=0, stacked=True)
    if name in _GROUPED_MLP:
        rule = names[f"mlp.experts.linear_{_GROUPED_MLP[name]}.weight"]
        return Key(rule, expert=0, stacked=True, transposed=True)
    return Key(names[name]) if name in names else None


def _placed(key: Key | None, layer: int, mtp: bool) -> Key | None:
    if key is None:
        return None
    return Key(key.rule, layer, mtp, key.expert, key.stacked, key.transposed, key.half)


def parse_module_key(name: str) -> Key | None:
    """Understand a key of a model's own state dict (layer and expert numbers are local)."""
    if found := _DECODER.fullmatch(name):
        return _placed(_in_layer(found[2]), int(found[1]), False)
    if found := _MTP_INNER.fullmatch(name):
        return _placed(_in_layer(found[2]), int(found[1]), True)
    if found := _MTP_OUTER.fullmatch(name):
        rule = _by_name("mtp").get(found[2])
        return Key(rule, int(found[1]), True) if rule else None
    rule = _by_name("outer").get(name)
    return Key(rule) if rule else None


_DIST_STACKED_LAYERS = re.compile(r"decoder\.layers\.(?!\d)(.+)")
_DIST_EXPERTS = re.compile(rf"mlp\.experts\.experts\.((?:\d+\.)?){_IN_EXPERT}")
_HALF = re.compile(r"(.+)_([wv])")


def _in_dist_layer(name: str) -> Key | None:
    """Understand the name of a tensor within a layer of ``torch_dist``."""
    half = None
    if (found := _HALF.fullmatch(name)) and found[1].endswith((".weight", ".bias", ".mask")):
        name, half = found[1], "wv".index(found[2])
    names = _by_name("layer")
    if found := _DIST_EXPERTS.fullmatch(name):
        rule = names[f"mlp.experts.{found[2]}"]
        expert = int(found[1][:-1]) if found[1] else 0
        return Key(rule, expert=expert, stacked=not found[1], half=half)
    return Key(names[name], half=half) if name in names else None


def parse_dist_key(name: str) -> tuple[Key, bool] | None:
    """Understand a key of ``torch_dist``; also say whether dimension 0 counts layers."""
    if found := _DECODER.fullmatch(name):
        key = _placed(_in_dist_layer(found[2]), int(found[1]), False)
        return (key, False) if key else None
    if found := _DIST_STACKED_LAYERS.fullmatch(name):
        inner = _in_dist_layer(found[1])
        if inner:
            key = _placed(inner, 0, False)
            return (key, True) if key else None
    if found := _MTP_INNER.fullmatch(name):
        key = _placed(_in_dist_layer(found[2]), int(found[1]), True)
        return (key, False) if key else None
    key = parse_module_key(name)
    return (key, False) if key else None


def atom_template(key: Key, layer: int | None) -> str:
    """Return an atom's name with ``{expert}`` and the half left open.

    Args:
        key: The key.
        layer: Global number of the layer.
    """
    if key.layer is None:
        return key.rule.name
    name = key.rule.name.replace("mlp.experts.", "mlp.experts.{expert}.")
    if not key.mtp:
        return f"decoder.layers.{layer}.{name}"
    inner = "" if key.rule.scope == "mtp" else "transformer_layer."
    return f"mtp.layers.{layer}.{inner}{name}"
