"""The global tensors of ``torch_dist``: their keys, axes, and the chunks that ranks will load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_moe.tools.checkpoint.model.arrays import Array
from megatron_moe.tools.checkpoint.model.boxes import Shape
from megatron_moe.tools.checkpoint.model.inventory import Kind, Layer
from megatron_moe.tools.checkpoint.plan.request import Resolved
from megatron_moe.tools.checkpoint.read.opened import Opened
from megatron_moe.tools.checkpoint.stored.dtypes import DType

# Names in torch_dist that differ from the module's; the same for dense and local MoE layers.
_DIST_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
}


@dataclass(frozen=True, slots=True)
class Global:
    """A global tensor of the target.

    Args:
        key: In ``torch_dist``, of the model.
        array: Its atoms.
        dtype: Of its weight.
        chunks: Boxes with the rank that writes each.
        trained: Whether the optimizer has states of it.
    """

    key: str
    array: Array
    dtype: DType
    chunks: tuple[tuple[Shape, Shape, int], ...]
    trained: bool


class Globals:
    """Lists the global tensors of a model at a layout."""

    def __init__(self, source: Opened, to: Resolved) -> None:
        self.source, self.to = source, to
        self.inventory = source.inventory
        layout = to.layout
        self._per_stage = layout.tp * layout.dp
        self._stage_of = {
            layer: pp
            for pp, chunks in enumerate(to.stages)
            for stage in chunks
            for layer in stage.layers
        }
        self._mtp_stage_of = {
            layer: pp
            for pp, chunks in enumerate(to.stages)
            for stage in chunks
            for layer in stage.mtp
        }

    def all(self) -> Iterator[Global]:
        """Yield every tensor that a rule names."""
        for name, kind in self.inventory.outer.kinds.items():
            pp = 0 if name.startswith("embedding") else self.to.layout.pp - 1
            shape = kind.shape
            if kind.rule.vocabulary and self.to.vocabulary is not None:
                shape = (self.to.vocabulary, *shape[1:])
            yield self._global(name, name, [], kind, shape, [pp])
        if self.to.stacked_layers:
            yield from self._stacked()
        else:
            for number, layer in sorted(self.inventory.layers.items()):
                pp = self._stage_of.get(number, 0)
                yield from self._layer(f"decoder.layers.{number}.", layer, pp)
        for number in sorted(self.inventory.mtp_outer):
            prefix, pp = f"mtp.layers.{number}.", self._mtp_stage_of[number]
            for name, kind in self.inventory.mtp_outer[number].kinds.items():
                yield self._global(prefix + name, prefix + name, [], kind, kind.shape, [pp])
            yield from self._layer(f"{prefix}transformer_layer.", self.inventory.mtp[number], pp)

    def _stacked(self) -> Iterator[Global]:
        layers = self.inventory.layers
        stages = [self._stage_of[number] for number in sorted(layers)]
        for name, kind in layers[0].kinds.items():
            key = f"decoder.layers.{self._dist_name(name, layers[0])}"
            atom = "decoder.layers.{layer}." + name
            yield self._global(key, atom, ["layer"], kind, kind.shape, stages, layers[0])

    def _layer(self, prefix: str, layer: Layer, pp: int) -> Iterator[Global]:
        for name, kind in layer.kinds.items():
            key = prefix + self._dist_name(name, layer)
            yield self._global(key, prefix + name, [], kind, kind.shape, [pp], layer)

    def _dist_name(self, name: str, layer: Layer) -> str:
        if name.startswith("mlp.experts."):
            return name.replace("mlp.experts.", "mlp.experts.experts.")
        if self.source.dist_names and self.to.style.fused_norms == self.source.fused_norms:
            return self.source.dist_names.get(name, name)
        if self.to.style.fused_norms and layer.num_experts and name.startswith("pre_mlp"):
            return name
        return _DIST_NAMES.get(name, name)

    def _global(
        self,
        key: str,
        atom: str,
        lead: list[str],
        kind: Kind,
        shape: Shape,
        stages: list[int],
        layer: Layer | None = None,
    ) -> Global:
        expert = kind.rule.name.startswith("mlp.experts.")
        own = list(shape)
        if kind.halves == 2:
            own[0] *= 2
        sizes = [len(stages)] if lead else []
        if expert:
            assert layer is not None
            atom = atom.replace("mlp.experts.", "mlp.experts.{expert}.")
            lead = [*lead, "expert"]
            sizes.append(layer.num_experts)
        array = Array(atom, (*sizes, *own), tuple(lead), (0,) * len(lead), kind.halves)
        chunks = tuple(self._chunks(array, kind, stages, expert))
        return Global(key, array, kind.dtype, chunks, not kind.rule.buffer)

    def _chunks(
        self, array: Array, kind: Kind, stages: list[int], expert: bool
    ) -> Iterator[tuple[Shape, Shape, int]]:
        layout = self.to.layout
        count = layout.expert_tp if expert else layout.tp
        cut = kind.rule.cut_dim
        own = list(array.shape[len(array.lead) :])
        own[0] //= kind.halves if own else 1
        if cut is None:
            count = 1
        else:
            own[cut] //= count
        per_rank = array.shape[len(array.lead) - 1] // layout.ep if expert else 1
        for index in product(*(range(n) for n in array.shape[: len(array.lead)])):
            pp = stages[index[0]] if "layer" in array.lead else stages[0]
            base = pp * self._per_stage
            for half, part in product(range(kind.halves), range(count)):
                start = [0] * len(own)
                if own:
                    start[0] = half * array.shape[len(array.lead)] // kind.halves
                if cut is not None:
                    start[cut] += part * own[cut]
                rank = part + (index[-1] // per_rank * layout.expert_tp if expert else 0)
                yield (*index, *start), (*(1,) * len(index), *own), base + rank
