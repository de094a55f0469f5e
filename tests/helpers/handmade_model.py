"""The model of the hand-made checkpoints: its parameters, whole and as ranks hold them.

It has grouped attention, gated experts and untied embeddings. What a rank holds is cut here with
plain slicing, so that readers are judged by other code than their own.
"""

from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

HIDDEN, FFN, VOCAB = 4, 4, 16
ATTENTION, QKV = 4, 12
ROLES = ("weight", "master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checkpoint to write.

    Args:
        tp: Parallel sizes, as in Megatron; ``etp`` None for ``tp``.
        layers: Decoder layers, each with ``experts`` experts.
        optimizer: None, ``plain``, ``distributed`` (torch), ``fully`` or ``dp`` (torch_dist).
        arguments: Changes of the saved arguments.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    dp: int = 1
    layers: int = 2
    experts: int = 4
    optimizer: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def expert_tp(self) -> int:
        return self.tp if self.etp is None else self.etp

    @property
    def separate(self) -> bool:
        return self.ep > 1 or self.expert_tp != self.tp

    def namespace(self) -> Namespace:
        return Namespace(
            **{
                "num_layers": self.layers,
                "hidden_size": HIDDEN,
                "num_attention_heads": 2,
                "num_query_groups": 2,
                "num_experts": self.experts,
                "swiglu": True,
                "untie_embeddings_and_output_weights": True,
                "vocab_size": VOCAB,
                "padded_vocab_size": VOCAB,
                "make_vocab_size_divisible_by": 1,
                "mtp_num_layers": None,
                "transformer_impl": "local",
                "tensor_model_parallel_size": self.tp,
                "pipeline_model_parallel_size": self.pp,
                "virtual_pipeline_model_parallel_size": None,
                "expert_model_parallel_size": self.ep,
                "expert_tensor_parallel_size": self.expert_tp,
                "context_parallel_size": 1,
                "data_parallel_size": self.dp,
                "world_size": self.tp * self.pp * self.dp,
                "moe_single_grouped_weight": False,
            }
            | self.arguments
        )


# Within a layer, in registration order: shape and how tensor parallelism cuts it.
_LAYER = {
    "input_layernorm.weight": ((HIDDEN,), None),
    "self_attention.linear_proj.weight": ((HIDDEN, ATTENTION), 1),
    "self_attention.linear_qkv.weight": ((QKV, HIDDEN), 0),
    "pre_mlp_layernorm.weight": ((HIDDEN,), None),
}
_EXPERT = {"linear_fc1.weight": ((2 * FFN, HIDDEN), 0), "linear_fc2.weight": ((HIDDEN, FFN), 1)}
_DIST_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def value(name: str, shape: tuple[int, ...], role: str = "weight") -> torch.Tensor:
    """Return the one whole parameter of this name: numbers that differ from every other's."""
    numel = int(np.prod(shape))
    start = sum(ord(c) * (i + 1) for i, c in enumerate(name)) % 9973 + 0.25 * ROLES.index(role)
    if role == "master":  # equals the weight
        start -= 0.25
    return torch.arange(numel, dtype=torch.float32).reshape(shape) + start * 1000


def atoms(recipe: Recipe, role: str = "weight") -> dict[str, np.ndarray]:
    """Return every atom of the model by the tools' name."""
    out = {}
    ends = [("embedding.word_embeddings.weight", (VOCAB, HIDDEN))]
    ends += [
        ("decoder.final_layernorm.weight", (HIDDEN,)),
        ("output_layer.weight", (VOCAB, HIDDEN)),
    ]
    for name, shape in ends:
        out[name] = value(name, shape, role).numpy()
    for layer in range(recipe.layers):
        prefix = f"decoder.layers.{layer}."
        for name, (shape, _) in (_LAYER | _router(recipe)).items():
            out[prefix + name] = value(prefix + name, shape, role).numpy()
        for expert in range(recipe.experts):
            base = f"{prefix}mlp.experts.{expert}."
            for name, (shape, _) in _EXPERT.items():
                whole = value(base + name, shape, role).numpy()
                if "fc1" in name:
                    out[f"{base}{name}.gate"], out[f"{base}{name}.up"] = whole[:FFN], whole[FFN:]
                else:
                    out[base + name] = whole
    return out


def _router(recipe: Recipe) -> dict[str, Any]:
    return {"mlp.router.weight": ((recipe.experts, HIDDEN), None)} if recipe.experts else {}


def _cut(whole: torch.Tensor, dim: int | None, index: int, count: int, gated: bool) -> torch.Tensor:
    if dim is None or count == 1:
        return whole
    if gated:
        halves = [half.chunk(count)[index] for half in whole.chunk(2)]
        return torch.cat(halves)
    return whole.chunk(count, dim)[index].contiguous()


def local_state(
    recipe: Recipe, tp: int, pp: int, ep: int, etp: int, role: str = "weight"
) -> "OrderedDict[str, torch.Tensor]":
    """Return one rank's state dict, in registration order."""
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    name = "embedding.word_embeddings.weight"
    if pp == 0:
        state[name] = _cut(value(name, (VOCAB, HIDDEN), role), 0, tp, recipe.tp, False)
    per_stage = recipe.layers // recipe.pp
    for local in range(per_stage):
        layer = pp * per_stage + local
        for name, (shape, dim) in (_LAYER | _router(recipe)).items():
            whole = value(f"decoder.layers.{layer}.{name}", shape, role)
            state[f"decoder.layers.{local}.{name}"] = _cut(whole, dim, tp, recipe.tp, False)
        per_rank = recipe.experts // recipe.ep
        for i in range(per_rank):
            for name, (shape, dim) in _EXPERT.items():
                base = f"decoder.layers.{layer}.mlp.experts.{ep * per_rank + i}.{name}"
                mine = _cut(value(base, shape, role), dim, etp, recipe.expert_tp, "fc1" in name)
                state[f"decoder.layers.{local}.mlp.experts.local_experts.{i}.{name}"] = mine
    if pp == recipe.pp - 1:
        name = "decoder.final_layernorm.weight"
        state[name] = value(name, (HIDDEN,), role)
        name = "output_layer.weight"
        state[name] = _cut(value(name, (VOCAB, HIDDEN), role), 0, tp, recipe.tp, False)
    return state


def dist_tensors(recipe: Recipe, role: str = "weight") -> dict[str, torch.Tensor]:
    """Return global tensors by key, with one axis for layers and one for experts."""
    out = {}
    for name, shape in (
        ("embedding.word_embeddings.weight", (VOCAB, HIDDEN)),
        ("decoder.final_layernorm.weight", (HIDDEN,)),
        ("output_layer.weight", (VOCAB, HIDDEN)),
    ):
        out[name] = value(name, shape, role)
    layers = range(recipe.layers)
    for name, (shape, _) in (_LAYER | _router(recipe)).items():
        stack = [value(f"decoder.layers.{i}.{name}", shape, role) for i in layers]
        out[f"decoder.layers.{_DIST_NORMS.get(name, name)}"] = torch.stack(stack)
    for name, (shape, _) in _EXPERT.items() if recipe.experts else ():
        stack = [
            torch.stack(
                [
                    value(f"decoder.layers.{i}.mlp.experts.{e}.{name}", shape, role)
                    for e in range(recipe.experts)
                ]
            )
            for i in layers
        ]
        out[f"decoder.layers.mlp.experts.experts.{name}"] = torch.stack(stack)
    return out
