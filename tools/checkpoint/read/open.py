"""Open a checkpoint of any format: every atom located and proved whole, no tensor read."""

from __future__ import annotations

from pathlib import Path

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.model.atoms import MASTER, STATES, WEIGHT, AtomId
from megatron_moe.tools.checkpoint.model.boxes import fault_of_cover
from megatron_moe.tools.checkpoint.model.buffers import Parameter
from megatron_moe.tools.checkpoint.model.catalogue import is_buffer
from megatron_moe.tools.checkpoint.model.inventory import Inventory, take
from megatron_moe.tools.checkpoint.model.layout import Coordinates, Pipeline
from megatron_moe.tools.checkpoint.model.members import runs_stacked
from megatron_moe.tools.checkpoint.model.ranks import Rank, Style
from megatron_moe.tools.checkpoint.read import optimizers, torch_dist, torch_files
from megatron_moe.tools.checkpoint.read.locate import locate
from megatron_moe.tools.checkpoint.read.opened import Opened
from megatron_moe.tools.checkpoint.stored.dtypes import FLOAT32


def open_checkpoint(
    path: Path,
    *,
    iteration: int | None = None,
    optimizer: bool = True,
    trusted: frozenset[str] = frozenset(),
) -> Opened:
    """Open a checkpoint.

    Args:
        path: Folder passed to ``--save``, or one iteration's folder.
        iteration: Which; the tracker's when None.
        optimizer: Whether to read optimizer state.
        trusted: Names let through in pickles (not run).

    Returns:
        The checkpoint with every atom located. Cost: its pickles are read, no tensor.

    Raises:
        CheckpointError: It is incomplete, damaged, of another format, or a key is unknown.
    """
    location = locate(path, iteration)
    if location.form == "torch":
        opened, collector, files = torch_files.read(location, trusted)
        if optimizer:
            optimizers.read_legacy(opened, collector, files, trusted)
    else:
        opened, collector, flat = torch_dist.read(location, trusted, optimizer=optimizer)
        if optimizer:
            optimizers.read_dist(opened, collector, flat, trusted, _rank_parameters(opened))
    _check_whole(opened)
    opened.inventory = take(opened.tensors.atoms)
    _check_arguments(opened)
    if optimizer:
        _check_optimizer(opened)
    return opened


def style_of(opened: Opened) -> Style:
    """Return how the run that wrote a checkpoint names its parameters, as far as it is known."""
    args = opened.args
    experts, fused = opened.experts, opened.fused_norms
    if experts == "grouped" and runs_stacked(args):
        experts = "stacked"
    if opened.location.form == "torch_dist":
        engine = getattr(args, "transformer_impl", "") == "transformer_engine"
        fused = engine
        grouped = getattr(args, "moe_grouped_gemm", False)
        experts = "sequential"
        if getattr(args, "moe_use_legacy_grouped_gemm", False) and grouped:
            experts = "grouped_mlp"
        elif grouped and engine:
            experts = "single" if getattr(args, "moe_single_grouped_weight", False) else "grouped"
        elif runs_stacked(args):
            experts = "stacked"
    tied = not getattr(args, "untie_embeddings_and_output_weights", False)
    return Style(experts, fused, tied)


def pipeline_of(args: object, inventory: Inventory) -> Pipeline:
    """Return how a run deals layers to stages."""
    layout = getattr(args, "pipeline_model_parallel_layout", None)
    text = getattr(layout, "input_data", layout)
    return Pipeline(
        num_layers=len(inventory.layers),
        mtp_layers=len(inventory.mtp_outer),
        first=getattr(args, "decoder_first_pipeline_num_layers", None),
        last=getattr(args, "decoder_last_pipeline_num_layers", None),
        count_embedding=bool(getattr(args, "account_for_embedding_in_pipeline_split", False)),
        count_loss=bool(getattr(args, "account_for_loss_in_pipeline_split", False)),
        text=text if isinstance(text, str) else None,
    )


class _rank_parameters:  # noqa: N801 (a function with a memory)
    """``(opened, place) -> parameters by chunk`` of the ranks that wrote ``dp_reshardable``."""

    def __init__(self, opened: Opened) -> None:
        self._ranks: tuple[Rank, list] | None = None

    def __call__(self, opened: Opened, place: Coordinates) -> list[list[Parameter]]:
        if self._ranks is None:
            inventory = take(opened.tensors.atoms)
            if inventory.unknown:
                raise CheckpointError(
                    f"{opened.folder}: {inventory.unknown[0]} is in no rule, so the flat buffers "
                    "of dp_reshardable cannot be told apart: add a Rule for it "
                    "(megatron_moe.checkpoint_rules), or pass --optim drop"
                )
            stages = pipeline_of(opened.args, inventory).stages(opened.layout)
            self._ranks = Rank(inventory, opened.layout, style_of(opened)), stages
        rank, stages = self._ranks
        return [rank.parameters(stage, place) for stage in stages[place.pp]]


def _check_whole(opened: Opened) -> None:
    for atom, held in opened.tensors.atoms.items():
        fault = fault_of_cover([(e.start, e.shape) for e in held.extents], held.shape)
        if fault:
            raise CheckpointError(f"{opened.folder}: {atom}: {fault}: it is not whole")


def _check_arguments(opened: Opened) -> None:
    """Compare the arguments' numbers with what was found."""
    inventory = opened.inventory
    found = {
        "num_experts": ("experts", inventory.num_experts),
        "num_layers": ("layers", len(inventory.layers)),
        "mtp_num_layers": ("MTP layers", len(inventory.mtp_outer)),
    }
    for name, (what, count) in found.items():
        said = getattr(opened.args, name, count) or 0
        # Layers may consist of nothing but tensors that no rule names.
        sure = what == "experts" or not inventory.unknown
        if isinstance(said, int) and said != count and sure:
            raise CheckpointError(
                f"{opened.folder}: its arguments say {said} {what}, its tensors hold {count}: "
                "files are missing, or of different runs"
            )


def _check_optimizer(opened: Opened) -> None:
    """Either all trained parameters have a state, or none."""
    atoms = opened.tensors.atoms
    states = {role for role in STATES if any(a.role == role for a in atoms)}
    if not states:
        return
    for atom, weight in atoms.items():
        if atom.role != WEIGHT or is_buffer(atom.name):
            continue
        for role in sorted(states):
            held = atoms.get(AtomId(atom.name, role))
            if held is not None and held.shape != weight.shape:
                raise CheckpointError(
                    f"{opened.folder}: {AtomId(atom.name, role)} has shape {list(held.shape)}, its "
                    f"weight {list(weight.shape)}: files of different runs were mixed"
                )
            # Weights in float32 may be their own masters.
            optional = role == MASTER and weight.dtype == FLOAT32
            if held is None and not optional and atom.name not in opened.unknown:
                raise CheckpointError(
                    f"{opened.folder}: {atom.name} has no {role}, others have: the optimizer state "
                    "is not whole (frozen parameters?). Pass --optim drop to reshard the weights"
                )
