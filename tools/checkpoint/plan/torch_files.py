"""Lay out a legacy ``torch`` checkpoint: one file of state dicts for each model-parallel rank."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from megatron_moe.tools.checkpoint.model import buffers
from megatron_moe.tools.checkpoint.model.arrays import Array
from megatron_moe.tools.checkpoint.model.atoms import MASTER, MOMENT1, MOMENT2, WEIGHT, AtomId
from megatron_moe.tools.checkpoint.model.boxes import row_major
from megatron_moe.tools.checkpoint.model.buffers import Parameter
from megatron_moe.tools.checkpoint.model.layout import Coordinates, Places
from megatron_moe.tools.checkpoint.model.members import bucket_size, of_member
from megatron_moe.tools.checkpoint.model.ranks import Local, Rank
from megatron_moe.tools.checkpoint.plan import state
from megatron_moe.tools.checkpoint.plan.output import NewArchive, OutFile, Target
from megatron_moe.tools.checkpoint.plan.request import Resolved
from megatron_moe.tools.checkpoint.read.opened import Opened
from megatron_moe.tools.checkpoint.read.optimizers import grouped
from megatron_moe.tools.checkpoint.read.torch_files import MODEL_FILE, STATES_FILE
from megatron_moe.tools.checkpoint.stored.dtypes import FLOAT32, DType
from megatron_moe.tools.checkpoint.stored.pickles import torch_dtype


def folder_of(place: Coordinates, to: Resolved) -> str:
    """Return Megatron's folder of a place; it has no ETP in it."""
    name = f"mp_rank_{place.tp:02d}"
    name += f"_{place.pp:03d}" if to.layout.pp > 1 else ""
    return name + (f"_{place.ep:03d}" if to.layout.ep > 1 else "")


class TorchTarget:
    """Lays the files out; ``build`` returns the target."""

    def __init__(self, source: Opened, to: Resolved) -> None:
        self.source, self.to = source, to
        self.target = Target()
        self.rank = Rank(source.inventory, to.layout, to.style, to.vocabulary)
        self.args = state.arguments(source, to)
        self.groups = state.member_groups(source, to) if to.optimizer else []

    def build(self) -> Target:
        """Return the whole target."""
        for place, dense, experts in Places(self.to.layout).writers():
            self._model_file(place)
            if self.to.optimizer == "distributed":
                self._states_file(place, dense, experts)
        return self.target

    def _new_file(self, place: Coordinates, name: str) -> NewArchive:
        self.target.files.append(OutFile(f"{folder_of(place, self.to)}/{name}"))
        return NewArchive(self.target, len(self.target.files) - 1, name.partition(".")[0])

    def _model_file(self, place: Coordinates) -> None:
        new = self._new_file(place, MODEL_FILE)
        content: dict[str, Any] = {"args": self.args}
        content |= {
            "checkpoint_version": self.source.common.get("checkpoint_version", 3.0),
            "iteration": self.source.common.get("iteration", 0),
        }
        stages = self.to.stages[place.pp]
        chunks = [list(self.rank.tensors(stage, place)) for stage in stages]
        for v, chunk in enumerate(chunks):
            key = "model" if len(chunks) == 1 else f"model{v}"
            content[key] = self._chunk(new, chunk)
        if self.to.optimizer:
            content["optimizer"] = self._optimizer(new, place)
        for key in ("opt_param_scheduler", "num_floating_point_operations_so_far"):
            if key in self.source.common:
                content[key] = self.source.common[key]
        random = state.random_state(self.source, self.to, place.pp, place.tp, self.target)
        if random is not None:
            content["rng_state"] = random
        new.finish(content)

    def _chunk(self, new: NewArchive, chunk: list[Local]) -> OrderedDict[str, Any]:
        """State dict of a model chunk, with the empty FP8 states that linear layers ask for."""
        out: OrderedDict[str, Any] = OrderedDict()
        owned = {local.key.rule.name.rpartition(".")[0] for local in chunk}
        alone = sorted(name for name in self.source.extra_states - owned if "attention" in name)
        layer = ""
        for i, local in enumerate(chunk):
            if local.key.layer is not None and not local.name.startswith(layer or "?"):
                tail = local.name.partition(f".{local.key.layer}.")
                layer = tail[0] + tail[1]
                out |= {f"{layer}{name}._extra_state": None for name in alone}
            out[local.name] = self._whole(
                new, WEIGHT, local.array, self._dtype(local.array), local.name
            )
            owner = local.name.rpartition(".")[0]
            follows = chunk[i + 1].name if i + 1 < len(chunk) else ""
            rule = local.key.rule.name.rpartition(".")[0]
            if follows.rpartition(".")[0] != owner and rule in self.source.extra_states:
                out |= dict.fromkeys(_extra_keys(local, owner))
        return out

    def _dtype(self, array: Array) -> DType:
        return self.source.tensors.atoms[AtomId(next(array.names()))].dtype

    def _whole(self, new: NewArchive, role: str, array: Array, dtype: DType, label: str) -> Any:
        """Reserve an array of its own and send its atoms there."""
        shape, strides = array.shape, row_major(array.shape)
        if array.transposed:  # the parameter's shape is flat, its memory a view
            e, a, b = array.shape
            shape = (a, e * b) if "linear_fc1" in array.template else (e * a, b)
        named = label if role == WEIGHT else f"{role} of {label}"
        stored, record = new.tensor(dtype, shape, named)
        for part in array.all_parts(0, strides):
            self.target.put(role, part, record)
        return stored

    def _members(self, place: Coordinates) -> list[list[list[Parameter]]]:
        """Parameters by optimizer, then by chunk."""
        chunks = [self.rank.parameters(stage, place) for stage in self.to.stages[place.pp]]
        if len(self.groups) == 1:
            return [chunks]
        return [of_member(chunks, self.to.layout, member) for member in (0, 1)]

    def _optimizer(self, new: NewArchive, place: Coordinates) -> Any:
        members = []
        for groups, chunks in zip(self.groups, self._members(place), strict=True):
            if self.to.optimizer == "distributed":
                members.append(
                    state.with_scaler(self.source, {"optimizer": {"param_groups": groups}})
                )
            else:
                members.append(self._plain(new, groups, [p for c in chunks for p in c]))
        return members[0] if len(members) == 1 else members

    def _plain(
        self, new: NewArchive, groups: list[dict[str, Any]], ordered: list[Parameter]
    ) -> dict[str, Any]:
        optimizer = self.source.optimizer
        assert optimizer is not None
        masters, states, full, index = [], {}, [], 0
        for number, group in enumerate(groups):
            mine = grouped(ordered, groups, number)
            full.append(group | {"params": list(range(index, index + len(mine)))})
            kept = []
            for parameter in mine:
                kept.append(self._state(new, MASTER, parameter))
                one = {"step": state.step_tensor(optimizer)} if state.torch_adam(optimizer) else {}
                for role in (MOMENT1, MOMENT2):
                    one[role] = self._state(new, role, parameter)
                states[index] = one
                index += 1
            masters.append(kept)
        inner = {"state": states, "param_groups": full}
        if state.half_precision(self.source.args):
            return state.with_scaler(
                self.source, {"optimizer": inner, "fp32_from_fp16_params": masters}
            )
        return inner

    def _state(self, new: NewArchive, role: str, parameter: Parameter) -> Any:
        if role == MASTER and not state.half_precision(self.source.args):
            return None
        return self._whole(new, role, parameter.array, FLOAT32, parameter.key)

    def _states_file(self, place: Coordinates, dense: bool, experts: bool) -> None:
        new = self._new_file(place, STATES_FILE)
        members: list[Any] = []
        for number, chunks in enumerate(self._members(place)):
            writes = experts if number else dense
            members.append(self._buffers(new, chunks, place) if writes else None)
        new.finish(members[0] if len(members) == 1 else members)

    def _buffers(
        self, new: NewArchive, chunks: list[list[Parameter]], place: Coordinates
    ) -> dict[Any, Any]:
        out: dict[Any, Any] = {"buckets_coalesced": True}
        index = 0
        for v, parameters in enumerate(chunks):
            if not parameters:
                continue
            size = bucket_size(self.args, self.to.layout, place.pp, v)
            layout = self.to.layout
            dp = layout.expert_dp if parameters[0].expert else layout.dp
            buckets = buffers.cut(parameters, size, dp)
            numel = sum(bucket.numel for bucket in buckets)
            entry: dict[str, Any] = {}
            for name, role in buffers.STATES.items():
                label = f"{role} of chunk {v}"
                entry[name], record = new.tensor(FLOAT32, (numel,), label)
                self.fill(buckets, role, record)
            out[index] = {buffer_dtypes(self._dtype(parameters[0].array), self.args): entry}
            entry["numel_unpadded"] = numel
            index += 1
        return out

    def fill(self, buckets: list[buffers.Bucket], role: str, record: int) -> None:
        """Send the parameters of buckets, one behind the other, to a record."""
        begin, used = 0, 0
        for bucket in buckets:
            for parameter, start in bucket.starts:
                strides = row_major(parameter.array.shape)
                for part in parameter.array.all_parts(begin + start, strides):
                    self.target.put(role, part, record)
                used += parameter.numel
            begin += bucket.numel
        self.target.records[record].gaps = begin - used


def buffer_dtypes(dtype: DType, args: Any) -> tuple[Any, Any]:
    """Return the key of a buffer: type of its parameters, type of their gradients."""
    reduced = getattr(args, "accumulate_allreduce_grads_in_fp32", True)
    return torch_dtype(dtype), torch_dtype(FLOAT32 if reduced else dtype)


def _extra_keys(local: Local, owner: str) -> list[str]:
    """Keys of a module's FP8 states; our stacked experts have none in a plain state dict."""
    return [] if local.key.stacked else [f"{owner}._extra_state"]
