"""A checkpoint opened: its atoms and everything that is not a tensor."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.model.atoms import (
    AtomId,
    Extent,
    Held,
    Part,
    Record,
    Tensors,
)
from megatron_moe.tools.checkpoint.model.boxes import Shape
from megatron_moe.tools.checkpoint.model.inventory import Inventory
from megatron_moe.tools.checkpoint.model.layout import Layout
from megatron_moe.tools.checkpoint.read.locate import Location


@dataclass
class OptimizerState:
    """The optimizer without its tensors.

    Args:
        kind: ``plain``, ``distributed`` (legacy), ``dp_reshardable``, ``fully_reshardable`` or
            ``fully_sharded_model_space``.
        groups: Parameter groups of dense parameters, without ``params``.
        expert_groups: Those of experts, where they have an optimizer of their own.
        step: Optimizer steps taken.
        grad_scaler: State of the loss scaler, with fp16.
        rest: Further entries of the optimizer's state.
    """

    kind: str
    groups: list[dict[str, Any]]
    expert_groups: list[dict[str, Any]] | None
    step: Any = None
    grad_scaler: Any = None


@dataclass
class Object:
    """A pickled object of ``torch_dist``: where its archive lies."""

    path: str
    offset: int
    length: int


@dataclass
class Opened:
    """A checkpoint, read but for its tensors' bytes.

    Args:
        location: Where it is.
        dialect: Megatron minor that writes like this.
        args: The run's arguments.
        layout: Parallel sizes it was written with.
        tensors: Its atoms.
        common: What all ranks share: iteration, scheduler, ...
        optimizer: None when it holds no optimizer.
        rng: Random states by (pp, tp) or (pp, tp, dp), as pickled.
        objects: ``torch_dist`` objects by key.
        rerun: State of Megatron's rerun machine per rank, kept as it is.
        stacked_layers: ``torch_dist`` with one tensor for all layers.
        fused_norms: Norms named as Transformer Engine's modules name them.
        experts: Spelling of expert keys, as :class:`Style` has it.
        files: Every file with its size, relative to the folder.
        notes: What a reader should know.
        unknown: Tensors of ``torch_dist`` that no rule names; they pass through.
    """

    location: Location
    dialect: str
    args: Namespace
    layout: Layout
    tensors: Tensors
    common: dict[str, Any]
    optimizer: OptimizerState | None = None
    rng: dict[tuple[int, ...], Any] = field(default_factory=dict)
    objects: dict[str, Object] = field(default_factory=dict)
    stacked_layers: bool = False
    fused_norms: bool = False
    experts: str = "sequential"
    files: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    inventory: Inventory = field(default_factory=Inventory)
    # Modules, within their layer or model, that keep an (empty) FP8 state.
    extra_states: set[str] = field(default_factory=set)
    # Names within a layer that ``torch_dist`` uses, by rule.
    dist_names: dict[str, str] = field(default_factory=dict)
    # Legacy: order in which each chunk registers its parameters, by (file, chunk).
    chunks: dict[tuple[str, int], list[str]] = field(default_factory=dict)

    @property
    def singletons(self) -> bool:
        """Whether ``torch_dist`` has one key for each layer and expert."""
        content = self.common.get("content_metadata") or {}
        return bool(content.get("singleton_local_shards"))

    @property
    def folder(self) -> Path:
        """Folder of its files."""
        return self.location.folder


class Collector:
    """Gathers parts of atoms, telling first copies from replicas."""

    def __init__(self, root: Path) -> None:
        self.tensors = Tensors(root)
        self._covered: dict[AtomId, int] = {}  # elements
        self._seen: set[tuple[AtomId, Shape, Shape]] = set()

    def record(self, record: Record) -> int:
        """Add a record; return its number."""
        self.tensors.records.append(record)
        return len(self.tensors.records) - 1

    def add(self, role: str, part: Part, record: int) -> None:
        """Add a part of an atom.

        Raises:
            CheckpointError: Two places disagree on an atom's shape or type.
        """
        atom = AtomId(part.name, role)
        stored = self.tensors.records[record]
        held = self.tensors.atoms.get(atom)
        if held is None:
            held = self.tensors.atoms[atom] = Held(part.whole, stored.dtype)
        if held.shape != part.whole or held.dtype != stored.dtype:
            raise CheckpointError(
                f"{stored.path}: {atom} is {stored.dtype.name}{list(part.whole)} here and "
                f"{held.dtype.name}{list(held.shape)} elsewhere: files of different runs were "
                "mixed, or the parallel sizes saved with them are not theirs"
            )
        extent = Extent(record, part.start, part.shape, part.offset, part.strides)
        box, covered = (atom, part.start, part.shape), self._covered.get(atom, 0)
        # A copy in a flat buffer may be cut at other elements than the first, which comes whole.
        if box in self._seen or covered + prod(part.shape) > prod(part.whole):
            held.replicas.append(extent)
        else:
            self._seen.add(box)
            self._covered[atom] = covered + prod(part.shape)
            held.extents.append(extent)


def layout_of(args: Namespace) -> Layout:
    """Return the parallel sizes that a run's arguments say."""

    def size(name: str) -> int:
        return int(getattr(args, name, None) or 1)

    per_stage = getattr(args, "virtual_pipeline_model_parallel_size", None)
    etp = getattr(args, "expert_tensor_parallel_size", None)
    tp = size("tensor_model_parallel_size")
    cp = size("context_parallel_size")
    world = size("world_size")
    pp = size("pipeline_model_parallel_size")
    dp = getattr(args, "data_parallel_size", None)
    return Layout(
        tp=tp,
        pp=pp,
        vpp=int(per_stage or 1) if pp > 1 else 1,
        ep=size("expert_model_parallel_size"),
        etp=int(etp) if etp else None,
        dp=int(dp) * cp if dp else max(world // (tp * pp), 1),
        cp=cp,
    )
