"""Tiny checkpoints in Megatron's formats, written with torch alone; flat buffers filled by hand."""

import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.handmade_model import (
    HIDDEN,
    ROLES,
    VOCAB,
    Recipe,
    atoms,
    dist_tensors,
    local_state,
    value,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

__all__ = [
    "HIDDEN",
    "ROLES",
    "VOCAB",
    "Recipe",
    "atoms",
    "contents",
    "dist",
    "dist_tensors",
    "legacy",
    "read_back",
    "value",
]


def _members(recipe: Recipe, state: "OrderedDict[str, torch.Tensor]") -> list[list[str]]:
    """Names of each optimizer's parameters: dense and expert ones apart where Megatron does so."""
    if not recipe.separate:
        return [list(state)]
    return [[n for n in state if (".experts." in n) == expert] for expert in (False, True)]


def _groups(names: list[str], state: dict[str, torch.Tensor]) -> list[list[str]]:
    """With weight decay first, then without; empty groups are not made."""
    split = [[n for n in names if (state[n].ndim == 1) == bare] for bare in (False, True)]
    return [group for group in split if group]


def _plain(recipe: Recipe, place: tuple[int, int, int, int]) -> Any:
    by_role = {role: local_state(recipe, *place, role) for role in ROLES}
    out = []
    for names in _members(recipe, by_role["weight"]):
        groups, states, masters, index = [], {}, [], 0
        for group in _groups(names, by_role["weight"]):
            decays = by_role["weight"][group[0]].ndim > 1
            numbers = list(range(index, index + len(group)))
            groups.append({"params": numbers, "wd_mult": float(decays), "lr": 1e-3, "step": 7})
            masters.append([by_role["master"][name] for name in group])
            for name in group:
                states[index] = {r: by_role[r][name] for r in ("exp_avg", "exp_avg_sq")}
                index += 1
        inner = {"state": states, "param_groups": groups}
        out.append({"optimizer": inner, "fp32_from_fp16_params": masters})
    return out if recipe.separate else out[0]


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Lay parameters out as the distributed optimizer does, in one bucket."""
    pieces: list[torch.Tensor] = []
    for tensor in reversed(list(state.values())):
        length = sum(map(len, pieces))
        pieces += [torch.zeros(-length % 64), tensor.reshape(-1)]
    return torch.cat(pieces)


def _distributed(recipe: Recipe, place: tuple[int, int, int, int]) -> Any:
    out = []
    weights = local_state(recipe, *place)
    for names in _members(recipe, weights):
        buffers = {}
        for key, role in (
            ("param", "master"),
            ("exp_avg", "exp_avg"),
            ("exp_avg_sq", "exp_avg_sq"),
        ):
            mine = local_state(recipe, *place, role)
            buffers[key] = flat({name: mine[name] for name in names})
        buffers["numel_unpadded"] = len(buffers["param"])
        out.append({"buckets_coalesced": True, 0: {(torch.bfloat16, torch.float32): buffers}})
    return out if recipe.separate else out[0]


def _param_groups(recipe: Recipe) -> Any:
    """What the distributed optimizer keeps in the model's file."""
    group = {"params": [], "wd_mult": 1.0, "lr": 1e-3, "step": 7}
    one = {"optimizer": {"param_groups": [group, {**group, "wd_mult": 0.0}]}}
    return [one, one] if recipe.separate else one


Edit = Callable[[str, dict[str, Any]], None]


def legacy(folder: Path, recipe: Recipe, edit: Edit | None = None, iteration: int = 7) -> Path:
    """Write a ``torch`` checkpoint; return the folder given to ``--save``.

    Args:
        folder: To write to.
        recipe: What.
        edit: Called with each file's folder name and its state before it is saved.
        iteration: Number.
    """
    for name, place in _files(recipe):
        tp, pp, ep, etp = place
        state: dict[str, Any] = {
            "args": recipe.namespace(),
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "model": local_state(recipe, tp, pp, ep, etp),
            "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 14},
            "num_floating_point_operations_so_far": 1.5e9,
            "rng_state": [{"torch_rng_state": torch.arange(4, dtype=torch.uint8)}],
        }
        if recipe.optimizer == "plain":
            state["optimizer"] = _plain(recipe, place)
        elif recipe.optimizer == "distributed":
            state["optimizer"] = _param_groups(recipe)
        if edit is not None:
            edit(name, state)
        target = folder / f"iter_{iteration:07d}" / name
        target.mkdir(parents=True)
        torch.save(state, target / "model_optim_rng.pt")
        if recipe.optimizer == "distributed":
            torch.save(_distributed(recipe, place), target / "distrib_optim.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


def _files(recipe: Recipe) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """Names of the files that ranks write, with their (tp, pp, ep, etp)."""
    seen = set()
    for pp in range(recipe.pp):
        for rank in range(recipe.tp * recipe.dp):
            etp, ep = rank % recipe.expert_tp, rank // recipe.expert_tp % recipe.ep
            tp = rank % recipe.tp
            name = f"mp_rank_{tp:02d}"
            name += f"_{pp:03d}" if recipe.pp > 1 else ""
            name += f"_{ep:03d}" if recipe.ep > 1 else ""
            if name not in seen:
                seen.add(name)
                yield name, (tp, pp, ep, etp)


@dataclass
class Saved:
    """What a ``torch_dist`` checkpoint is about to hold; tests may spoil it first.

    Args:
        tensors: Global tensor and its chunks ``(start, tensor)`` by key.
        objects: Pickled things by key.
        files: Bytes of each file, made by :meth:`metadata`.
    """

    tensors: dict[str, tuple[tuple[int, ...], list[tuple[tuple[int, ...], torch.Tensor]]]]
    objects: dict[str, Any]
    files: dict[str, bytearray] = field(default_factory=dict)

    def metadata(self) -> Metadata:
        """Put everything in two files; return the metadata."""
        self.files = {"__0_0.distcp": bytearray(), "__1_0.distcp": bytearray()}
        described: dict[str, Any] = {}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        for key, (shape, chunks) in self.tensors.items():
            boxes = []
            for i, (start, tensor) in enumerate(chunks):
                boxes.append(ChunkStorageMetadata(torch.Size(start), tensor.shape))
                index = MetadataIndex(key, torch.Size(start), i)
                storage[index] = self._put(tensor.contiguous().clone(), f"__{i % 2}_0.distcp")
            properties = TensorProperties(dtype=chunks[0][1].dtype)
            described[key] = TensorStorageMetadata(properties, torch.Size(shape), boxes)
        for key, thing in self.objects.items():
            described[key] = BytesStorageMetadata()
            storage[MetadataIndex(key)] = self._put(thing, "__0_0.distcp")
        return Metadata(described, storage_data=storage)

    def _put(self, thing: Any, name: str) -> _StorageInfo:
        out = BytesIO()
        torch.save(thing, out)
        file = self.files[name]
        info = _StorageInfo(name, len(file), out.tell())
        file += out.getvalue()
        return info


def contents(recipe: Recipe) -> Saved:
    """Return what the ``torch_dist`` checkpoint of a recipe holds (as of Megatron 0.19)."""
    saved = Saved({}, {})
    for key, whole in dist_tensors(recipe).items():
        saved.tensors[key] = (tuple(whole.shape), _chunks(whole, recipe))
    common: dict[str, Any] = {
        "args": recipe.namespace(),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 14},
        "num_floating_point_operations_so_far": 1.5e9,
        "content_metadata": {"singleton_local_shards": False},
    }
    if recipe.optimizer is not None:
        kind = {"fully": "fully_reshardable", "dp": "dp_reshardable"}.get(recipe.optimizer)
        common["content_metadata"]["distrib_optim_sharding_type"] = kind
        groups = _param_groups(recipe)
        common["optimizer"] = dict(enumerate(groups)) if recipe.separate else groups
    if recipe.optimizer in ("fully", "plain"):
        master = "param" if recipe.optimizer == "fully" else "fp32_param"
        for role, name in (
            ("master", master),
            ("exp_avg", "exp_avg"),
            ("exp_avg_sq", "exp_avg_sq"),
        ):
            for key, whole in dist_tensors(recipe, role).items():
                saved.tensors[f"optimizer.state.{name}.{key}"] = (
                    tuple(whole.shape),
                    _chunks(whole, recipe),
                )
    elif recipe.optimizer == "dp":
        saved.tensors |= _flat_tensors(recipe)
    saved.objects["common_state/shard_0_1"] = [common]
    rng = [{"torch_rng_state": torch.arange(4, dtype=torch.uint8)}]
    for pp in range(recipe.pp):
        for tp in range(recipe.tp):
            saved.objects[f"rng_state/shard_{pp}.{tp}_{recipe.pp}.{recipe.tp}"] = [rng]
    return saved


def _chunks(whole: torch.Tensor, recipe: Recipe) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """Cut along the first axis, and along the last where TP divides it."""
    out = []
    for i, row in enumerate(whole.split(max(1, whole.shape[0] // 2))):
        first = i * max(1, whole.shape[0] // 2)
        if whole.ndim < 2:
            out.append(((first,), row))
            continue
        width = whole.shape[-1] // recipe.tp
        for t in range(recipe.tp):
            start = (first, *(0,) * (whole.ndim - 2), t * width)
            out.append((start, row[..., t * width : (t + 1) * width]))
    return out


def _flat_tensors(recipe: Recipe) -> dict[str, Any]:
    """Buckets of ``dp_reshardable``, each cut in two for two data-parallel ranks."""
    out = {}
    for pp in range(recipe.pp):
        for rank in range(recipe.tp * recipe.dp):
            tp, etp = rank % recipe.tp, rank % recipe.expert_tp
            ep = rank // recipe.expert_tp % recipe.ep
            places = [tp + recipe.tp * pp, etp + recipe.expert_tp * (ep + recipe.ep * pp)]
            weights = local_state(recipe, tp, pp, ep, etp)
            for member, names in enumerate(_members(recipe, weights)):
                prefix = f"chained_{member}." if recipe.separate else ""
                for state in ("param", "exp_avg", "exp_avg_sq"):
                    role = "master" if state == "param" else state
                    mine = local_state(recipe, tp, pp, ep, etp, role)
                    buffer = flat({name: mine[name] for name in names})
                    key = (
                        f"{prefix}optimizer.distributed.dp_group_idx_{places[member]}.gbuf_idx_0."
                        f"dtype_(torch.bfloat16, torch.float32).bucket_idx_0.{state}"
                    )
                    half = len(buffer) // 2
                    chunks = [((0,), buffer[:half]), ((half,), buffer[half:])]
                    out[key] = ((len(buffer),), chunks)
    return out


def dist(
    folder: Path,
    recipe: Recipe,
    edit: Callable[[Saved], None] | None = None,
    edit_metadata: Callable[[Metadata], None] | None = None,
) -> Path:
    """Write a ``torch_dist`` checkpoint; return the folder given to ``--save``.

    Args:
        folder: To write to.
        recipe: What.
        edit: Changes what is saved.
        edit_metadata: Changes the metadata of what was saved.
    """
    saved = contents(recipe)
    if edit is not None:
        edit(saved)
    metadata = saved.metadata()
    if edit_metadata is not None:
        edit_metadata(metadata)
    target = folder / "iter_0000007"
    target.mkdir(parents=True)
    for name, data in saved.files.items():
        (target / name).write_bytes(data)
    (target / ".metadata").write_bytes(pickle.dumps(metadata))
    (target / "metadata.json").write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    )
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


def read_back(opened: Any, role: str = "weight") -> dict[str, np.ndarray]:
    """Read every float32 atom of an opened checkpoint, through its extents, with numpy."""
    out, records = {}, {}
    for atom, held in opened.tensors.atoms.items():
        if atom.role != role:
            continue
        whole = np.full(held.shape, np.nan, np.float32)
        for extent in [*held.extents, *held.replicas]:
            if extent.record not in records:
                records[extent.record] = _record(opened, opened.tensors.records[extent.record])
            view = np.lib.stride_tricks.as_strided(
                records[extent.record][extent.offset :],
                extent.shape,
                [4 * stride for stride in extent.strides],
            )
            box = tuple(slice(s, s + n) for s, n in zip(extent.start, extent.shape, strict=True))
            assert np.isnan(whole[box]).all() or (whole[box] == view).all(), atom
            whole[box] = view
        out[atom.name] = whole
    return out


def _record(opened: Any, record: Any) -> np.ndarray:
    """Load a record with torch, not with the tools' own reader."""
    data = (opened.folder / record.path).read_bytes()
    if record.archive is not None:
        start, length = record.archive
        data = data[start : start + length]
    reader = torch._C.PyTorchFileReader(BytesIO(data))
    return np.frombuffer(reader.get_record(f"data/{record.key}"), np.float32)
