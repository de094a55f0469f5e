"""Legacy ``torch`` checkpoints: one pickle of state dicts for each model-parallel rank."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.model.arrays import Array
from megatron_moe.tools.checkpoint.model.atoms import WEIGHT, Record
from megatron_moe.tools.checkpoint.model.catalogue import (
    EMBEDDING,
    OUTPUT,
    Key,
    extra_state_owner,
    parse_module_key,
)
from megatron_moe.tools.checkpoint.model.layout import Coordinates, Layout
from megatron_moe.tools.checkpoint.read.local import Place, local_array
from megatron_moe.tools.checkpoint.read.locate import Location
from megatron_moe.tools.checkpoint.read.opened import Collector, Opened, layout_of
from megatron_moe.tools.checkpoint.stored import archive, pickles
from megatron_moe.tools.checkpoint.stored.pickles import StoredTensor

MODEL_FILE, STATES_FILE = "model_optim_rng.pt", "distrib_optim.pt"
_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3}))?(?:_(\d{3}))?")
_LAYER = re.compile(r"(decoder|mtp)\.layers\.(\d+)\.")
_SMALL = {"rng_state", "opt_param_scheduler", "rerun_state_machine"}  # few bytes: read at once
_FOREIGN_FILES = {
    "layer_wise_optimizer_*.pt": "layer-wise (Muon) optimizer state",
    "modelopt_state*": "ModelOpt state",
    "adapter_*": "LoRA adapters",
}


@dataclass
class RankFile:
    """One ``mp_rank_*`` folder, its pickle read.

    Args:
        name: Folder.
        place: Its model-parallel coordinates.
        state: The pickle's content.
        members: Records of ``model_optim_rng.pt``.
        chunks: State dict of each virtual stage.
        offsets: Global number of each chunk's first decoder layer, and of its first MTP layer.
        arrays: What each trained parameter is made of, by chunk, in registration order.
    """

    name: str
    place: Coordinates
    state: dict[str, Any]
    members: dict[str, archive.Member]
    chunks: list[dict[str, Any]]
    offsets: list[tuple[int, int]] = field(default_factory=list)
    arrays: list[dict[str, tuple[Key, Array]]] = field(default_factory=list)

    @property
    def path(self) -> str:
        """Its model file, relative to the checkpoint."""
        return f"{self.name}/{MODEL_FILE}"


def read_pickle(path: Path, trusted: frozenset[str]) -> tuple[Any, archive.Archive]:
    """Read the pickle of a `torch.save` file, not its tensors.

    Raises:
        CheckpointError: Damaged, truncated, or a pickle that could run code.
    """
    fd, opened = archive.open_file(path)
    try:
        state = pickles.load(archive.read_member(fd, opened, "data.pkl"), str(path), trusted)
        if isinstance(state, dict):
            for key in _SMALL & set(state):
                state[key] = pickles.inlined(state[key], fd, opened)
            for member in optimizer_members(state.get("optimizer")):
                if "grad_scaler" in member:
                    member["grad_scaler"] = pickles.inlined(member["grad_scaler"], fd, opened)
        return state, opened
    finally:
        os.close(fd)


def optimizer_members(optimizer: Any) -> list[dict[str, Any]]:
    """Return the states of chained optimizers, or of the one there is."""
    if optimizer is None:
        return []
    if isinstance(optimizer, dict) and optimizer and all(isinstance(key, int) for key in optimizer):
        return [optimizer[key] for key in sorted(optimizer)]
    return list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]


def _folders(location: Location) -> dict[str, tuple[int, int, int]]:
    """Return ``mp_rank_*`` folders with the numbers in their names, (tp, second, third)."""
    found = {}
    for folder in sorted(location.folder.glob("mp_rank_*")):
        match = _FOLDER.fullmatch(folder.name)
        if not match:
            raise CheckpointError(
                f"{folder}: not a name that Megatron gives (mp_rank_TT[_PPP][_EEE])"
            )
        for pattern, what in _FOREIGN_FILES.items():
            for odd in folder.glob(pattern):
                raise CheckpointError(
                    f"{odd}: {what} cannot be resharded; move it away to reshard the rest"
                )
        if not (folder / MODEL_FILE).is_file():
            raise CheckpointError(f"{folder}: {MODEL_FILE} is missing: an incomplete copy or save")
        found[folder.name] = (int(match[1]), int(match[2] or 0), int(match[3] or 0))
    return found


def _coordinates(
    folders: dict[str, tuple[int, int, int]], layout: Layout, location: Location
) -> dict[str, Coordinates]:
    """Return the place of each file; check that none is missing.

    Raises:
        CheckpointError: Files are missing, or expert shards were lost when it was written.
    """
    if layout.expert_tp > layout.tp:
        raise CheckpointError(
            f"{location.folder}: saved with ETP {layout.expert_tp} > TP {layout.tp}: the torch "
            "format has no ETP in its file names, so ranks overwrote one another and part of every "
            "expert is gone. No tool can restore it: go back to a torch_dist checkpoint, and save "
            "with --ckpt-format torch_dist"
        )
    places = {}
    for name, (tp, second, third) in folders.items():
        # The pipeline number is there with PP > 1, the expert number with EP > 1.
        pp, ep = (second, third) if layout.pp > 1 else (0, second)
        places[name] = Coordinates(tp, pp, ep, tp % layout.expert_tp)
    have = {(c.tp, c.pp) for c in places.values()}
    for pp in range(layout.pp):
        for tp in range(layout.tp):
            if (tp, pp) not in have:
                raise CheckpointError(_missing(location, layout, f"tp {tp}, pp {pp}"))
        for ep in range(layout.ep):
            for etp in range(layout.expert_tp):
                if not any((c.pp, c.ep, c.etp) == (pp, ep, etp) for c in places.values()):
                    raise CheckpointError(
                        _missing(location, layout, f"pp {pp}, ep {ep}, etp {etp}")
                    )
    return places


def _missing(location: Location, layout: Layout, what: str) -> str:
    cause = (
        "Megatron up to 0.18 writes too few files when TP > EP·ETP (issue 4200)"
        if layout.tp > layout.ep * layout.expert_tp
        else "an incomplete copy, or a save that was cut off"
    )
    return (
        f"{location.folder}: no mp_rank file holds {what} of {layout}: {cause}. Complete the copy, "
        "or take another iteration"
    )


def read(location: Location, trusted: frozenset[str]) -> tuple[Opened, Collector, list[RankFile]]:
    """Open a legacy checkpoint: its weights as atoms; the optimizer is read by the caller.

    Raises:
        CheckpointError: It is incomplete, damaged, or holds a key that no rule names.
    """
    folders = _folders(location)
    first = next(iter(folders))
    state, opened = read_pickle(location.folder / first / MODEL_FILE, trusted)
    args = _arguments(state, location)
    layout = layout_of(args)
    places = _coordinates(folders, layout, location)
    files = []
    for name, place in places.items():
        if name != first:
            state, opened = read_pickle(location.folder / name / MODEL_FILE, trusted)
        chunks = [state[key] for key in _chunk_keys(state, layout, f"{name}/{MODEL_FILE}")]
        files.append(RankFile(name, place, state, opened.members, chunks))
    num_layers, num_mtp = _number_layers(files, layout)
    _compare_with_arguments(args, num_layers, num_mtp, location)
    collector = Collector(location.folder)
    result = Opened(
        location, _dialect(args), args, layout, collector.tensors, _common(files[0].state)
    )
    records = Records(collector)
    for file in files:
        _read_weights(file, layout, args, records, result)
        result.rng[file.place.pp, file.place.tp] = file.state.get("rng_state")
    _count_files(result)
    return result, collector, files


def _arguments(state: dict[str, Any], location: Location) -> Namespace:
    args = state.get("args")
    if not isinstance(args, Namespace):
        raise CheckpointError(
            f"{location.folder}: holds no 'args', from which the parallel sizes are known: not "
            "saved by Megatron's training loop"
        )
    version = state.get("checkpoint_version", 0)
    heads, groups = (getattr(args, n, None) for n in ("num_attention_heads", "num_query_groups"))
    if version < 2.0:
        grouped = groups not in (None, heads) and getattr(args, "group_query_attention", False)
        raise CheckpointError(
            f"{location.folder}: checkpoint version {version} orders Q, K and V otherwise"
            f"{' (and with grouped queries no conversion is defined)' if grouped else ''}: load it "
            "with Megatron 0.12 and save it again"
        )
    return args


def _dialect(args: Namespace) -> str:
    # Arguments are the only trace of a version in this format.
    return "0.19" if hasattr(args, "moe_single_grouped_weight") else "0.16"


def _common(state: dict[str, Any]) -> dict[str, Any]:
    keep = ("checkpoint_version", "iteration", "opt_param_scheduler",
            "num_floating_point_operations_so_far", "rerun_state_machine")  # fmt: skip
    return {key: state[key] for key in keep if key in state}


def _chunk_keys(state: dict[str, Any], layout: Layout, where: str) -> list[str]:
    if "model" in state:
        return ["model"]
    keys = sorted((k for k in state if re.fullmatch(r"model\d+", k)), key=lambda k: int(k[5:]))
    if not keys:
        raise CheckpointError(f"{where}: holds no 'model': not saved by Megatron's training loop")
    if len(keys) != layout.vpp:
        raise CheckpointError(
            f"{where}: holds {len(keys)} model chunks, its arguments say VPP {layout.vpp}"
        )
    return keys


def _number_layers(files: list[RankFile], layout: Layout) -> tuple[int, int]:
    """Give every chunk the global number of its first layers, by what each really holds."""
    counts: dict[tuple[int, int], tuple[int, int]] = {}
    for file in files:
        for v, chunk in enumerate(file.chunks):
            found = {m[1]: -1 for m in map(_LAYER.match, chunk) if m}
            for match in filter(None, map(_LAYER.match, chunk)):
                found[match[1]] = max(found[match[1]], int(match[2]))
            mine = (found.get("decoder", -1) + 1, found.get("mtp", -1) + 1)
            if counts.setdefault((v, file.place.pp), mine) != mine:
                raise CheckpointError(
                    f"{file.path}: holds {mine} decoder and MTP layers, another file of the same "
                    f"stage {counts[v, file.place.pp]}: files of different runs were mixed"
                )
    offsets, at = {}, (0, 0)
    for cell in sorted(counts):
        offsets[cell] = at
        at = (at[0] + counts[cell][0], at[1] + counts[cell][1])
    for file in files:
        file.offsets = [offsets[v, file.place.pp] for v in range(len(file.chunks))]
    return at


def _compare_with_arguments(args: Namespace, layers: int, mtp: int, location: Location) -> None:
    said = getattr(args, "num_layers", None)
    if said is not None and said != layers:
        raise CheckpointError(
            f"{location.folder}: its arguments say {said} layers, its files hold {layers}: a file "
            "is missing, or files of different runs were mixed"
        )
    if (getattr(args, "mtp_num_layers", None) or 0) != mtp:
        raise CheckpointError(
            f"{location.folder}: its arguments say {getattr(args, 'mtp_num_layers', 0)} MTP "
            f"layers, its files hold {mtp}: files of different runs were mixed"
        )


class Records:
    """Numbers the records of files, each once."""

    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        self._numbers: dict[tuple[str, str], int] = {}

    def of(
        self, path: str, members: dict[str, archive.Member], tensor: StoredTensor, label: str
    ) -> int:
        """Return the number of the record that holds a tensor.

        Raises:
            CheckpointError: The record is missing or has another size than the pickle says.
        """
        key = (path, tensor.storage.key)
        if key not in self._numbers:
            member = members.get(f"data/{tensor.storage.key}")
            want = tensor.storage.numel * tensor.dtype.itemsize
            if member is None or member.size != want:
                raise CheckpointError(
                    f"{path}: record data/{tensor.storage.key} of {label} should have {want} "
                    f"bytes, has {member.size if member else 'none'}: the file is damaged"
                )
            record = Record(
                path, None, tensor.storage.key, tensor.dtype, tensor.storage.numel, label
            )
            self._numbers[key] = self.collector.record(record)
        return self._numbers[key]


def _read_weights(
    file: RankFile, layout: Layout, args: Namespace, records: Records, result: Opened
) -> None:
    tied = not getattr(args, "untie_embeddings_and_output_weights", False)
    for v, chunk in enumerate(file.chunks):
        place = Place(file.path, file.place, *file.offsets[v], layout, args)
        arrays: dict[str, tuple[Key, Array]] = {}
        for name, value in chunk.items():
            if owner := extra_state_owner(name):
                result.extra_states.add(owner)
                continue
            if not isinstance(value, StoredTensor):
                raise CheckpointError(
                    f"{file.path}: {name} is {type(value).__name__}, not a tensor"
                )
            key = parse_module_key(name)
            if key is None:
                raise CheckpointError(
                    f"{file.path}: {name} is in no rule: how it is cut over ranks is not known. "
                    "Add a Rule for it (megatron_moe.checkpoint_rules, docs/checkpoints.md)"
                )
            if tied and key.rule.name == OUTPUT:
                key = replace(key, rule=_embedding_rule())
            array, view = local_array(name, key, value.shape, place)
            if not key.rule.buffer:
                arrays[name] = (key, array)
            record = records.of(file.path, file.members, value, name)
            strides = value.strides if view is None else view
            for part in array.all_parts(value.offset, strides):
                records.collector.add(WEIGHT, part, record)
            _note_style(result, name, key)
        file.arrays.append(arrays)
        result.chunks[file.path, v] = list(arrays)


def _embedding_rule() -> Any:
    key = parse_module_key(EMBEDDING)
    assert key is not None
    return key.rule


def _note_style(result: Opened, name: str, key: Key) -> None:
    if key.rule.fused and name.endswith(key.rule.fused):
        result.fused_norms = True
    if key.expert is not None:
        result.experts = (
            "grouped_mlp" if key.transposed
            else "single" if key.stacked
            else "sequential" if "local_experts" in name
            else "grouped"
        )  # fmt: skip


def _count_files(result: Opened) -> None:
    for path in sorted(result.folder.rglob("*")):
        if path.is_file():
            result.files[str(path.relative_to(result.folder))] = path.stat().st_size
