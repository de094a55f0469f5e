"""``torch_dist`` checkpoints: global tensors in chunks, described by ``.metadata``."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections import defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.model.arrays import Array
from megatron_moe.tools.checkpoint.model.atoms import MASTER, WEIGHT, Part, Record
from megatron_moe.tools.checkpoint.model.boxes import (
    Shape,
    boxes_of_range,
    fault_of_cover,
    row_major,
)
from megatron_moe.tools.checkpoint.model.catalogue import (
    Key,
    atom_template,
    extra_state_owner,
    parse_dist_key,
)
from megatron_moe.tools.checkpoint.read.local import is_gated
from megatron_moe.tools.checkpoint.read.locate import Location
from megatron_moe.tools.checkpoint.read.opened import Collector, Object, Opened, layout_of
from megatron_moe.tools.checkpoint.stored import archive, pickles
from megatron_moe.tools.checkpoint.stored.dtypes import DType

METADATA, COMMON = ".metadata", "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"
RNG = re.compile(r"rng_state/shard_([\d.]+)_([\d.]+)")
_STATE = re.compile(
    r"(?:chained_\d+\.)?optimizer\.state\.(fp32_param|param|exp_avg|exp_avg_sq)\.(.+)"
)
FLAT = re.compile(
    r"(?:chained_(?P<member>\d+)\.)?optimizer\.distributed\.dp_group_idx_(?P<group>\d+)\."
    r"gbuf_idx_(?P<buffer>\d+)\.dtype_(?P<dtype>\(.+?\))\.bucket_idx_(?P<bucket>\d+)\."
    r"(?P<state>param|exp_avg|exp_avg_sq)"
)
_PREFIX = re.compile(r"^(decoder|mtp)\.layers\.(\d+\.)?(transformer_layer\.|mtp_model_layer\.)?")
_OTHER_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.")
ROLE_OF = {"fp32_param": MASTER, "param": MASTER, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of a global tensor: its box, and the record that holds it."""

    start: Shape
    shape: Shape
    record: int


@dataclass
class Stored:
    """A global tensor of the checkpoint."""

    key: str
    shape: Shape
    dtype: DType
    chunks: list[Chunk]


def read(
    location: Location, trusted: frozenset[str], *, optimizer: bool = True
) -> tuple[Opened, Collector, list[Stored]]:
    """Open a ``torch_dist`` checkpoint; flat optimizer buffers are left to the caller.

    Returns:
        The checkpoint, its atoms' collector, and the flat tensors of ``dp_reshardable``.

    Raises:
        CheckpointError: It is incomplete or damaged.
    """
    folder = location.folder
    metadata = pickles.load((folder / METADATA).read_bytes(), str(folder / METADATA), trusted)
    state = getattr(metadata, "_state", None)
    parts = ("state_dict_metadata", "storage_data")
    if not isinstance(state, dict) or not all(isinstance(state.get(p), dict) for p in parts):
        raise CheckpointError(f"{folder / METADATA}: does not hold torch's checkpoint metadata")
    places = _places(state["storage_data"], location)
    objects = {key: place for (key, offset), place in places.items() if offset is None}
    _check_files(location, places)
    common = _common(location, objects, trusted)
    args = common.pop("args", None)
    if not isinstance(args, Namespace):
        raise CheckpointError(f"{folder}: holds no 'args': not saved by Megatron's training loop")
    collector = Collector(folder)
    result = Opened(
        location, _dialect(state, objects, folder), args, layout_of(args), collector.tensors, common
    )
    result.objects = objects
    result.extra_states = {owner for owner in map(extra_state_owner, objects) if owner}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            result.files[str(path.relative_to(folder))] = path.stat().st_size
    original = _original_shapes(state)
    flat = []
    for key, info in state["state_dict_metadata"].items():
        if not hasattr(info, "chunks"):
            continue
        if not optimizer and _OTHER_OPTIMIZER.match(key):
            continue
        stored = _stored(key, info, places, collector, location)
        if FLAT.fullmatch(key):
            flat.append(stored)
        else:
            _add(stored, result, collector, original.get(key))
    _read_random_states(result, trusted)
    return result, collector, flat


def _places(storage: dict, location: Location) -> dict[tuple[str, Shape | None], Object]:
    places = {}
    for index, info in storage.items():
        offset = getattr(index, "offset", None)
        start = None if offset is None else tuple(offset._args[0])
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(
                f"{location.folder}: {index.fqn} is stored compressed (transform "
                f"{info.transform_descriptors}): save without transforms"
            )
        path = Path(info.relative_path)
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointError(
                f"{location.folder}: {METADATA} places {index.fqn} in {str(path)!r}, outside its "
                "folder: it was tampered with"
            )
        places[index.fqn, start] = Object(info.relative_path, info.offset, info.length)
    return places


def _check_files(location: Location, places: dict[tuple[str, Shape | None], Object]) -> None:
    """Compare each file's size with what the metadata places in it."""
    needed: dict[str, tuple[int, str]] = {}
    for (key, _), place in places.items():
        end = place.offset + place.length
        if end > needed.get(place.path, (-1, ""))[0]:
            needed[place.path] = (end, key)
    for name, (end, key) in sorted(needed.items()):
        path = location.folder / name
        if not path.is_file():
            raise CheckpointError(
                f"{path}: missing; {METADATA} places {key} in it: complete the copy, or take "
                "another iteration"
            )
        if path.stat().st_size < end:
            raise CheckpointError(
                f"{path}: truncated: {path.stat().st_size} bytes, {METADATA} places {key} up to "
                f"byte {end}. Restore it from a copy"
            )


def read_object(
    folder: Any, place: Object, key: str, trusted: frozenset[str]
) -> tuple[Any, archive.Archive, int]:
    """Read one pickled object; return it, its archive and an open descriptor."""
    path = folder / place.path
    fd = os.open(path, os.O_RDONLY)
    try:
        opened = archive.open_archive(fd, place.offset, place.length, f"{path} ({key})")
        data = archive.read_member(fd, opened, "data.pkl")
        return pickles.load(data, f"{path} ({key})", trusted), opened, fd
    except BaseException:
        os.close(fd)
        raise


def _common(
    location: Location, objects: dict[str, Object], trusted: frozenset[str]
) -> dict[str, Any]:
    if COMMON_OBJECT in objects:
        value, opened, fd = read_object(
            location.folder, objects[COMMON_OBJECT], COMMON_OBJECT, trusted
        )
        value = value[0] if isinstance(value, list) else value
    else:
        path = location.folder / COMMON
        if not path.is_file():
            raise CheckpointError(
                f"{location.folder}: neither {COMMON} nor {COMMON_OBJECT} is there: the save did "
                "not finish, or the copy is incomplete"
            )
        fd, opened = archive.open_file(path)
        value = pickles.load(archive.read_member(fd, opened, "data.pkl"), str(path), trusted)
    try:
        loaded: dict[str, Any] = pickles.inlined(value, fd, opened)
        if not isinstance(loaded, dict):
            raise CheckpointError(
                f"{opened.where}: holds {type(loaded).__name__}, not the state that ranks share: "
                "not saved by Megatron's training loop"
            )
        return loaded
    finally:
        os.close(fd)


def _dialect(state: dict, objects: dict[str, Object], folder: Any) -> str:
    if COMMON_OBJECT in objects:
        return "0.19"
    if "mcore_data" in state:
        return "0.14"
    for key in objects:
        found = RNG.fullmatch(key)
        if found and found[1].count(".") == 2:
            return "0.16"
    return "0.17"


def _original_shapes(state: dict) -> dict[str, Shape]:
    """True shapes of tensors that Megatron up to 0.15 stored as grids of flattened pieces."""
    shapes = {}
    for key, data in (state.get("mcore_data") or {}).items():
        shape = data.get("nd_reformulated_orig_global_shape") if isinstance(data, dict) else None
        if shape is not None:
            shapes[key] = tuple(getattr(shape, "_args", (shape,))[0])
    return shapes


def _stored(key: str, info: Any, places: dict, collector: Collector, location: Location) -> Stored:
    shape = tuple(info.size._args[0])
    properties = info.properties._state
    first = properties[0] if isinstance(properties, tuple) else properties["dtype"]
    dtype = pickles.dtype_of(first)
    if dtype is None:
        raise CheckpointError(f"{location.folder}: {key} has element type {first!r}, not known")
    chunks = []
    for chunk in info.chunks:
        start, size = tuple(chunk.offsets._args[0]), tuple(chunk.sizes._args[0])
        place = places.get((key, start))
        if place is None:
            raise CheckpointError(
                f"{location.folder}: {METADATA} lists a chunk of {key} at {start} and places it in "
                "no file: the save did not finish"
            )
        archive_at = (place.offset, place.length)
        record = Record(place.path, archive_at, "0", dtype, prod(size), key, size)
        chunks.append(Chunk(start, size, collector.record(record)))
    fault = fault_of_cover([(c.start, c.shape) for c in chunks], shape)
    if fault:
        raise CheckpointError(f"{location.folder}: {key}: {fault}: its chunks are not the tensor")
    return Stored(key, shape, dtype, chunks)


def _add(stored: Stored, result: Opened, collector: Collector, original: Shape | None) -> None:
    """Add the atoms of a global tensor."""
    found = _STATE.fullmatch(stored.key)
    role, model_key = (ROLE_OF[found[1]], found[2]) if found else (WEIGHT, stored.key)
    if not found and _OTHER_OPTIMIZER.match(stored.key):
        raise CheckpointError(
            f"{result.folder}: {stored.key} is optimizer state of a kind that is not read (Adam's "
            "fp32_param, exp_avg and exp_avg_sq are). Pass --optim drop to reshard the weights"
        )
    array = array_of(model_key, original or stored.shape, result, role)
    layers = getattr(result.args, "num_layers", None)
    if array.lead[:1] == ("layer",) and layers is not None and array.shape[0] != layers:
        raise CheckpointError(
            f"{result.folder}: {stored.key} holds {array.shape[0]} layers, its arguments say "
            f"{layers}: files of different runs were mixed"
        )
    for chunk in stored.chunks:
        if original is not None:
            for part in _grid_parts(array, stored.shape, original, chunk):
                collector.add(role, part, chunk.record)
            continue
        for part in array.parts(chunk.start, chunk.shape):
            collector.add(role, part, chunk.record)


def _grid_parts(array: Array, grid: Shape, shape: Shape, chunk: Chunk) -> list[Part]:
    """Parts of a chunk of a grid: cell (i, j, ...) holds a block, flattened and cut.

    ``grid`` is (X/x, Y/y, ..., x·y·...) for blocks (x, y, ...) of a tensor (X, Y, ...).
    """
    block = tuple(n // cells for n, cells in zip(shape, grid, strict=False))
    cell = tuple(i * n for i, n in zip(chunk.start, block, strict=False))
    begin, count = chunk.start[-1], chunk.shape[-1]
    strides = row_major(block)
    parts: list[Part] = []
    for start, size, flat in boxes_of_range(block, begin, begin + count):
        at = tuple(a + b for a, b in zip(cell, start, strict=True))
        parts += array.parts(at, size, flat - begin, strides)
    return parts


def array_of(key: str, shape: Shape, result: Opened, role: str) -> Array:
    """Describe a global tensor; one that no rule names is an atom of its own."""
    parsed = parse_dist_key(key)
    if parsed is None:
        if role == WEIGHT:
            result.unknown.add(key)
        return Array(key, shape)
    rule_key, stacked = parsed
    if role == WEIGHT:
        _note_style(result, key, rule_key, stacked)
    return dist_array(rule_key, stacked, shape, result.args)


def dist_array(key: Key, stacked: bool, shape: Shape, args: Namespace) -> Array:
    """Describe a global tensor with its leading axes."""
    template = atom_template(key, key.layer)
    lead: list[str] = []
    if stacked:
        template = re.sub(r"^decoder\.layers\.\d+\.", "decoder.layers.{layer}.", template)
        lead.append("layer")
    if key.expert is not None:
        if key.stacked:
            lead.append("expert")
        else:
            template = template.replace("{expert}", str(key.expert))
    gated = key.rule.gated and is_gated(args) and key.half is None
    return Array(template, shape, tuple(lead), (0,) * len(lead), 2 if gated else 1, key.half)


def _note_style(result: Opened, key: str, parsed: Key, stacked: bool) -> None:
    result.stacked_layers |= stacked
    if parsed.rule.name.startswith("pre_mlp_layernorm") and "pre_mlp_layernorm" in key:
        result.fused_norms = True  # only Transformer Engine's MoE layers keep this name
    if parsed.layer is not None and parsed.expert is None:
        suffix = key.removesuffix(f"_{'wv'[parsed.half]}") if parsed.half is not None else key
        name = _PREFIX.sub("", suffix, count=1)
        if name != parsed.rule.name:
            result.dist_names[parsed.rule.name] = name


def _read_random_states(result: Opened, trusted: frozenset[str]) -> None:
    for key, place in result.objects.items():
        if found := RNG.fullmatch(key):
            value, opened, fd = read_object(result.folder, place, key, trusted)
            try:
                at = tuple(int(n) for n in found[1].split("."))
                result.rng[at] = pickles.inlined(value, fd, opened)[0]
            finally:
                os.close(fd)


def group_flat(flat: list[Stored]) -> dict[tuple[int, int, int], dict[str, dict[int, Stored]]]:
    """Sort flat tensors: (member, group, buffer) → state → bucket → tensor."""
    sorted_: dict[tuple[int, int, int], dict[str, dict[int, Stored]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for stored in flat:
        found = FLAT.fullmatch(stored.key)
        assert found is not None
        place = (int(found["member"] or 0), int(found["group"]), int(found["buffer"]))
        sorted_[place][found["state"]][int(found["bucket"])] = stored
    return dict(sorted_)
