"""What a model consists of, read off its atoms: layers, experts, shapes."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.model.atoms import WEIGHT, AtomId, Held
from megatron_moe.tools.checkpoint.model.boxes import Shape
from megatron_moe.tools.checkpoint.model.catalogue import Rule, rules
from megatron_moe.tools.checkpoint.stored.dtypes import DType

_PLACE = re.compile(
    r"(?:decoder\.layers\.(?P<layer>\d+)\."
    r"|mtp\.layers\.(?P<mtp>\d+)\.(?P<inner>transformer_layer\.)?)"
)
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.")
_HALF = re.compile(r"\.(gate|up)$")


@dataclass(slots=True)
class Kind:
    """One parameter of a layer: its atoms' shape.

    Args:
        rule: Its rule.
        shape: Of one atom.
        dtype: Of its weight.
        halves: 2 with separate gate and linear atoms.
    """

    rule: Rule
    shape: Shape
    dtype: DType
    halves: int = 1


@dataclass(slots=True)
class Layer:
    """A layer's parameters by rule name, and how many experts it has."""

    kinds: dict[str, Kind] = field(default_factory=dict)
    num_experts: int = 0


@dataclass
class Inventory:
    """A model: decoder layers, MTP layers, and what is outside layers."""

    layers: dict[int, Layer] = field(default_factory=lambda: defaultdict(Layer))
    mtp: dict[int, Layer] = field(default_factory=lambda: defaultdict(Layer))
    mtp_outer: dict[int, Layer] = field(default_factory=lambda: defaultdict(Layer))
    outer: Layer = field(default_factory=Layer)
    unknown: list[str] = field(default_factory=list)

    def all_layers(self) -> list[Layer]:
        """Return everything that has parameters."""
        inner = [*self.layers.values(), *self.mtp.values(), *self.mtp_outer.values()]
        return [*inner, self.outer]

    @property
    def num_experts(self) -> int:
        """Experts of a layer that has some; 0 for a dense model."""
        return max(layer.num_experts for layer in self.all_layers())


def take(atoms: dict[AtomId, Held]) -> Inventory:
    """Read a model off its atoms' names.

    Raises:
        CheckpointError: Experts are missing, or layers are.
    """
    inventory = Inventory()
    named = {(rule.scope, rule.name): rule for rule in rules()}
    experts: dict[tuple[int, str], set[int]] = defaultdict(set)
    for atom, held in atoms.items():
        if atom.role != WEIGHT:
            continue
        name, expert, halves = atom.name, None, 1
        place = _PLACE.match(name)
        rest = name[place.end() :] if place else name
        if found := _EXPERT.match(rest):
            expert, rest = int(found[1]), rest.replace(found.group(), "mlp.experts.", 1)
        if found := _HALF.search(rest):
            rest, halves = rest[: found.start()], 2
        scope = "outer" if place is None else "layer"
        if place and place["mtp"] and not place["inner"]:
            scope = "mtp"
        rule = named.get((scope, rest))
        if rule is None:
            inventory.unknown.append(name)
            continue
        layer = _layer(inventory, place, scope)
        layer.kinds.setdefault(rest, Kind(rule, held.shape, held.dtype, halves))
        if expert is not None:
            experts[id(layer), rest].add(expert)
            layer.num_experts = max(layer.num_experts, expert + 1)
    order = {rule.name: i for i, rule in enumerate(rules())}
    for layer in inventory.all_layers():
        layer.kinds = dict(sorted(layer.kinds.items(), key=lambda item: order[item[0]]))
    _check_experts(inventory, experts)
    _check_layers(inventory)
    return inventory


def _layer(inventory: Inventory, place: re.Match | None, scope: str) -> Layer:
    if place is None:
        return inventory.outer
    if place["layer"] is not None:
        return inventory.layers[int(place["layer"])]
    number = int(place["mtp"])
    return inventory.mtp_outer[number] if scope == "mtp" else inventory.mtp[number]


def _check_experts(inventory: Inventory, experts: dict[tuple[int, str], set[int]]) -> None:
    for which, layers in (("layer", inventory.layers), ("MTP layer", inventory.mtp)):
        for number, layer in layers.items():
            for name in layer.kinds:
                found = experts.get((id(layer), name))
                if found is not None and len(found) != inventory.num_experts:
                    lost = sorted(set(range(inventory.num_experts)) - found)
                    raise CheckpointError(
                        f"{which} {number}: {name} of experts {lost} is missing: files are "
                        "missing, or of different runs"
                    )


def _check_layers(inventory: Inventory) -> None:
    if inventory.unknown:
        return  # layers of kinds that no rule names, as in hybrid models
    lost = sorted(set(range(len(inventory.layers))) - set(inventory.layers))
    if lost:
        raise CheckpointError(f"decoder layers {lost} are missing: files are missing")
