"""What one rank's model chunk holds, in registration order: the same for reading and writing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.model.arrays import Array
from megatron_moe.tools.checkpoint.model.boxes import Shape
from megatron_moe.tools.checkpoint.model.buffers import Parameter
from megatron_moe.tools.checkpoint.model.catalogue import EMBEDDING, OUTPUT, Key
from megatron_moe.tools.checkpoint.model.inventory import Inventory, Kind, Layer
from megatron_moe.tools.checkpoint.model.layout import Coordinates, Layout, Stage
from megatron_moe.tools.checkpoint.model.members import parameters_of, stacked


@dataclass(frozen=True, slots=True)
class Style:
    """How a build names and arranges its parameters.

    Args:
        experts: ``sequential`` (SequentialMLP), ``grouped`` (TEGroupedMLP), ``stacked`` (this
            plugin's: saved like ``grouped``, but one parameter), ``single`` (one tensor,
            ``--moe-single-grouped-weight``) or ``grouped_mlp`` (GroupedMLP, up to 0.16).
        fused_norms: Norms inside the linear layers behind them (Transformer Engine).
        tied: Embedding and output share one weight.
        mtp_name: Name of an MTP layer's inner layer.
    """

    experts: str = "sequential"
    fused_norms: bool = False
    tied: bool = False
    mtp_name: str = "mtp_model_layer"


@dataclass(frozen=True, slots=True)
class Local:
    """A tensor of a rank's state dict."""

    name: str
    key: Key
    array: Array


class Rank:
    """Lists the tensors of model-parallel ranks.

    Args:
        inventory: The model.
        layout: Parallel sizes.
        style: Names.
        vocabulary: Padded rows of the embedding; None for those stored.
    """

    def __init__(
        self, inventory: Inventory, layout: Layout, style: Style, vocabulary: int | None = None
    ) -> None:
        self.inventory, self.layout, self.style = inventory, layout, style
        self.vocabulary = vocabulary

    def tensors(self, stage: Stage, place: Coordinates) -> Iterator[Local]:
        """Yield the tensors of one chunk, buffers included."""
        outer = self.inventory.outer.kinds
        if stage.embedding or stage.mtp:
            for name, kind in outer.items():
                if name.startswith("embedding."):
                    yield self._outer(name, kind, place)
        for local, number in enumerate(stage.layers):
            prefix = f"decoder.layers.{number}."
            yield from self._layer(
                f"decoder.layers.{local}.", prefix, self.inventory.layers[number], place, local
            )
        if self._holds_final_norm(stage):
            for name, kind in outer.items():
                if name.startswith("decoder.final_layernorm"):
                    yield self._outer(name, kind, place)
        for local, number in enumerate(stage.mtp):
            yield from self._mtp_layer(local, number, place)
        if stage.output:
            yield from self._output(outer, place)

    def _holds_final_norm(self, stage: Stage) -> bool:
        if not self.inventory.mtp_outer:
            return stage.output
        return len(self.inventory.layers) - 1 in stage.layers

    def _output(self, outer: dict[str, Kind], place: Coordinates) -> Iterator[Local]:
        for name in (OUTPUT, "output_layer.bias"):
            if name in outer:
                yield self._outer(name, outer[name], place)
        if self.style.tied and self.layout.pp > 1 and OUTPUT not in outer:
            yield self._outer(EMBEDDING, outer[EMBEDDING], place, OUTPUT)

    def _outer(self, atom: str, kind: Kind, place: Coordinates, name: str | None = None) -> Local:
        shape = kind.shape
        if kind.rule.vocabulary and self.vocabulary is not None:
            shape = (self.vocabulary, *shape[1:])
        array = _slice(atom, kind, shape, place.tp, self.layout.tp)
        return Local(name or atom, Key(kind.rule), array)

    def _mtp_layer(self, local: int, number: int, place: Coordinates) -> Iterator[Local]:
        beside = self.inventory.mtp_outer[number].kinds
        first = [name for name in beside if not name.startswith("final_layernorm")]
        last = [name for name in beside if name.startswith("final_layernorm")]

        def outer(name: str) -> Local:
            kind = beside[name]
            array = _slice(
                f"mtp.layers.{number}.{name}", kind, kind.shape, place.tp, self.layout.tp
            )
            return Local(f"mtp.layers.{local}.{name}", Key(kind.rule, local, True), array)

        yield from map(outer, first)
        inner = self.inventory.mtp[number]
        yield from self._layer(
            f"mtp.layers.{local}.{self.style.mtp_name}.",
            f"mtp.layers.{number}.transformer_layer.",
            inner,
            place,
            local,
            mtp=True,
        )
        yield from map(outer, last)

    def _layer(
        self,
        module: str,
        atom: str,
        layer: Layer,
        place: Coordinates,
        local: int,
        mtp: bool = False,
    ) -> Iterator[Local]:
        for name, kind in self._ordered(layer):
            rule = kind.rule
            if rule.name.startswith("mlp.experts."):
                if name == "":  # placed where the first of them stands
                    for suffix, key, array in self._experts(atom, layer, place):
                        placed = Key(key.rule, local, mtp, key.expert, key.stacked, key.transposed)
                        yield Local(module + suffix, placed, array)
                continue
            array = _slice(atom + rule.name, kind, kind.shape, place.tp, self.layout.tp)
            yield Local(module + name, Key(rule, local, mtp), array)

    def _ordered(self, layer: Layer) -> Iterator[tuple[str, Kind]]:
        """Yield names in the module with their kinds; experts once, under an empty name."""
        moe = layer.num_experts > 0
        fused: dict[str, list[tuple[str, Kind]]] = {}
        if self.style.fused_norms:
            for kind in layer.kinds.values():
                inside = kind.rule.fused
                if inside and not (moe and kind.rule.name.startswith("pre_mlp")):
                    fused.setdefault(inside.rpartition(".")[0], []).append((inside, kind))
        hidden = {id(kind) for entries in fused.values() for _, kind in entries}
        seen_experts = False
        for name, kind in layer.kinds.items():
            if id(kind) in hidden:
                continue
            if name.startswith("mlp.experts."):
                if not seen_experts:
                    yield "", kind
                seen_experts = True
                continue
            owner = name.rpartition(".")[0]
            yield from fused.pop(owner, [])
            yield name, kind

    def _experts(
        self, atom: str, layer: Layer, place: Coordinates
    ) -> Iterator[tuple[str, Key, Array]]:
        kinds = {n: k for n, k in layer.kinds.items() if n.startswith("mlp.experts.")}
        local = layer.num_experts // self.layout.ep
        first = place.ep * local

        def one(name: str, expert: int) -> tuple[Key, Array]:
            kind = kinds[name]
            template = atom + name.replace("mlp.experts.", f"mlp.experts.{first + expert}.")
            array = _slice(template, kind, kind.shape, place.etp, self.layout.expert_tp)
            return Key(kind.rule, expert=expert), array

        style = self.style.experts
        if style == "sequential":
            for expert in range(local):
                for name in kinds:
                    tail = name.removeprefix("mlp.experts.")
                    yield (
                        f"mlp.experts.local_experts.{expert}.{tail}",
                        *one(name, expert),
                    )
        elif style in ("grouped", "stacked"):
            for linear in ("linear_fc1", "linear_fc2"):
                for expert in range(local):
                    for name in kinds:
                        if linear in name:
                            yield f"{name}{expert}", *one(name, expert)
        else:
            for name, kind in kinds.items():
                yield self._stack(atom, name, kind, local, first, place)

    def _stack(
        self, atom: str, name: str, kind: Kind, local: int, first: int, place: Coordinates
    ) -> tuple[str, Key, Array]:
        template = atom + name.replace("mlp.experts.", "mlp.experts.{expert}.")
        single = _slice(template, kind, kind.shape, place.etp, self.layout.expert_tp)
        transposed = self.style.experts == "grouped_mlp"
        shape = (local, *(single.shape[::-1] if transposed else single.shape))
        array = Array(
            template, shape, ("expert",), (first,), single.halves, None, single.cut,
            single.index, single.count, transposed,
        )  # fmt: skip
        if transposed and kind.rule.buffer:
            raise CheckpointError(
                f"--experts grouped_mlp: {name} has no place in GroupedMLP; pass --experts stacked"
            )
        if transposed:
            name = "mlp.experts.weight1" if "fc1" in name else "mlp.experts.weight2"
        return name, Key(kind.rule, expert=0, stacked=True, transposed=transposed), array

    def parameters(self, stage: Stage, place: Coordinates) -> list[Parameter]:
        """Return what the optimizer holds of one chunk."""
        tensors = (
            (t.name, t.key, t.array) for t in self.tensors(stage, place) if not t.key.rule.buffer
        )
        return parameters_of(
            stacked(tensors) if self.style.experts == "stacked" else tensors,
            self.layout,
            tied=self.style.tied,
            first_stage=stage.embedding and 0 in (stage.layers or (0,)),
            has_mtp=bool(self.inventory.mtp_outer),
            mtp_here=bool(stage.mtp),
        )


def _slice(template: str, kind: Kind, shape: Shape, index: int, count: int) -> Array:
    """Return the part of a parameter that one tensor-parallel rank holds."""
    cut = kind.rule.cut_dim if count > 1 else None
    own = list(shape)
    if cut is not None:
        own[cut] //= count
    if kind.halves == 2:
        own[0] *= 2
    return Array(template, tuple(own), halves=kind.halves, cut=cut, index=index, count=count)
