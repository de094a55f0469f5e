"""Optimizer state in all its forms, as atoms of the roles master, exp_avg and exp_avg_sq."""

from __future__ import annotations

import os
from typing import Any

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.model import buffers
from megatron_moe.tools.checkpoint.model.atoms import MASTER, WEIGHT
from megatron_moe.tools.checkpoint.model.boxes import boxes_of_range, row_major
from megatron_moe.tools.checkpoint.model.buffers import Bucket, Parameter
from megatron_moe.tools.checkpoint.model.layout import Coordinates, Layout
from megatron_moe.tools.checkpoint.model.members import (
    bucket_size,
    of_member,
    parameters_of,
    runs_stacked,
    stacked,
)
from megatron_moe.tools.checkpoint.read.opened import Collector, Opened, OptimizerState
from megatron_moe.tools.checkpoint.read.torch_dist import Stored, group_flat, read_object
from megatron_moe.tools.checkpoint.read.torch_files import (
    STATES_FILE,
    RankFile,
    Records,
    optimizer_members,
    read_pickle,
)
from megatron_moe.tools.checkpoint.stored import archive, pickles
from megatron_moe.tools.checkpoint.stored.pickles import StoredTensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


def file_parameters(file: RankFile, opened: Opened) -> list[list[Parameter]]:
    """Return the parameters of each chunk of a legacy file."""
    args = opened.args
    tied = not getattr(args, "untie_embeddings_and_output_weights", False)
    has_mtp = bool(getattr(args, "mtp_num_layers", None))
    merge = stacked if opened.experts == "grouped" and runs_stacked(args) else iter
    return [
        parameters_of(
            merge((name, *found) for name, found in arrays.items()),
            opened.layout,
            tied=tied,
            first_stage=file.place.pp == 0 and v == 0,
            has_mtp=has_mtp,
            mtp_here=any(name.startswith("mtp.") for name in arrays),
        )
        for v, arrays in enumerate(file.arrays)
    ]


def read_legacy(
    opened: Opened, collector: Collector, files: list[RankFile], trusted: frozenset[str]
) -> None:
    """Read the optimizer of a ``torch`` checkpoint.

    Raises:
        CheckpointError: Its structure is not one that Megatron's Adam writes.
    """
    holders = [file for file in files if file.state.get("optimizer") is not None]
    if not holders:
        opened.notes.append("no optimizer state")
        return
    distributed = any((opened.folder / file.name / STATES_FILE).is_file() for file in files)
    members = optimizer_members(holders[0].state["optimizer"])
    inner = [member.get("optimizer", member) for member in members]
    groups = [[_without_params(group) for group in one["param_groups"]] for one in inner]
    opened.optimizer = OptimizerState(
        "distributed" if distributed else "plain",
        groups[0],
        groups[1] if len(groups) > 1 else None,
        grad_scaler=members[0].get("grad_scaler"),
    )
    records = Records(collector)
    if not distributed:
        for file in files:
            _read_plain(file, opened, records)
        opened.optimizer.step = _plain_step(holders[0], opened)
        return
    opened.optimizer.step = groups[0][0].get("step")
    for file in files:
        path = opened.folder / file.name / STATES_FILE
        if path.is_file():
            _read_distributed(file, opened, records, trusted)


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _member_parameters(file: RankFile, opened: Opened, member: int) -> list[list[Parameter]]:
    """Parameters of one optimizer of a file, by chunk."""
    return of_member(file_parameters(file, opened), opened.layout, member)


def _read_plain(file: RankFile, opened: Opened, records: Records) -> None:
    members = optimizer_members(file.state["optimizer"])
    for number, member in enumerate(members):
        inner = member.get("optimizer", member)
        chunks = _member_parameters(file, opened, number)
        ordered = [p for chunk in chunks for p in chunk]
        masters = member.get("fp32_from_fp16_params")
        for place, group in enumerate(inner["param_groups"]):
            mine = grouped(ordered, inner["param_groups"], place)
            if len(mine) != len(group["params"]):
                raise CheckpointError(
                    f"{file.path}: optimizer {number} has {len(group['params'])} parameters in "
                    f"group {place}, the model {len(mine)} that belong there: its groups follow "
                    "another rule. Pass --optim drop to reshard the weights"
                )
            for i, (parameter, index) in enumerate(zip(mine, group["params"], strict=True)):
                if masters is not None:
                    _add_whole(file, parameter, MASTER, masters[place][i], records)
                for role in _MOMENTS:
                    state = inner["state"].get(index, {})
                    if role not in state:
                        raise CheckpointError(
                            f"{file.path}: optimizer state of {parameter.key} lacks {role}: only "
                            "Adam's is read. Pass --optim drop to reshard the weights"
                        )
                    _add_whole(file, parameter, role, state[role], records)


def grouped(ordered: list[Parameter], groups: list[dict[str, Any]], place: int) -> list[Parameter]:
    """Return the parameters of one group, in order: those with or without weight decay."""
    group = groups[place]
    decays = group.get("wd_mult", 1.0) != 0.0
    mine = [p for p in ordered if p.decay == decays]
    twins = [g for g in groups if (g.get("wd_mult", 1.0) != 0.0) == decays]
    if len(twins) == 1:
        return mine
    ends = bool(group.get("is_decoupled_lr", False))
    return [p for p in mine if _is_end(p) == ends]


def _is_end(parameter: Parameter) -> bool:
    return parameter.key.startswith(("embedding.word_embeddings", "output_layer"))


def _add_whole(
    file: RankFile, parameter: Parameter, role: str, tensor: Any, records: Records
) -> None:
    shape = parameter.array.shape
    same = isinstance(tensor, StoredTensor) and tensor.numel == parameter.numel
    if not same:
        raise CheckpointError(
            f"{file.path}: {role} of {parameter.key} is {tensor!r}, its weight has shape "
            f"{list(shape)}: the optimizer is not this model's"
        )
    record = records.of(file.path, file.members, tensor, f"{role} of {parameter.key}")
    strides = tensor.strides if tensor.shape == shape else row_major(shape)
    for part in parameter.array.all_parts(tensor.offset, strides):
        records.collector.add(role, part, record)


def _plain_step(file: RankFile, opened: Opened) -> Any:
    """The step count: of a group (fused Adam), or of any parameter (torch's)."""
    inner = optimizer_members(file.state["optimizer"])[0]
    inner = inner.get("optimizer", inner)
    if "step" in inner["param_groups"][0]:
        return inner["param_groups"][0]["step"]
    steps = [state["step"] for state in inner["state"].values() if "step" in state]
    if not steps:
        return None
    if not isinstance(steps[0], StoredTensor):
        return steps[0]
    fd, zipped = archive.open_file(opened.folder / file.path)
    try:
        return pickles.inlined(steps[0], fd, zipped)
    finally:
        os.close(fd)


def _read_distributed(
    file: RankFile, opened: Opened, records: Records, trusted: frozenset[str]
) -> None:
    path = f"{file.name}/{STATES_FILE}"
    states, zipped = read_pickle(opened.folder / path, trusted)
    members = states if isinstance(states, list) else [states]
    for number, member in enumerate(members):
        if member is None:
            continue  # this rank was the first of the other optimizer's replicas alone
        if not member.get("buckets_coalesced"):
            raise CheckpointError(
                f"{opened.folder / path}: buffers in separate buckets, as before February 2024: "
                "load it with Megatron 0.12 (--ckpt-convert-update-legacy-dist-opt-format) and "
                "save it again"
            )
        index = 0
        for v, parameters in enumerate(_member_parameters(file, opened, number)):
            if not parameters:
                continue
            ((_, tensors),) = member[index].items()
            index += 1
            where = f"{path}: optimizer {number}, model chunk {v}"
            size = bucket_size(opened.args, opened.layout, file.place.pp, v)
            dp = opened.layout.expert_dp if parameters[0].expert else opened.layout.dp
            numel = int(tensors["numel_unpadded"])
            found = _coalesced(parameters, numel, size, dp, where)
            for state, role in buffers.STATES.items():
                tensor = tensors.get(state)
                if tensor is None:
                    raise CheckpointError(f"{where}: lacks {state}: only Adam's state is read")
                if tensor.shape != (numel,):
                    raise CheckpointError(
                        f"{where}: {state} has shape {list(tensor.shape)}, the buffer {numel} "
                        "elements: the file is damaged. Restore it from a copy"
                    )
                record = records.of(path, zipped.members, tensor, f"{state} of chunk {v}")
                begin = 0
                for bucket in found:
                    for parameter, start in bucket.starts:
                        at = tensor.offset + begin + start
                        for part in parameter.array.all_parts(at, row_major(parameter.array.shape)):
                            records.collector.add(role, part, record)
                    begin += bucket.numel


def _coalesced(
    parameters: list[Parameter], numel: int, size: int | None, dp: int, where: str
) -> list[Bucket]:
    """Find the buckets of a buffer of which only the total length was saved."""
    tried = {}
    for candidate in dict.fromkeys((size, None)):
        for ranks in dict.fromkeys((dp, 1)):  # 1: Megatron without our patch of the padding
            found = buffers.cut(parameters, candidate, ranks)
            total = sum(bucket.numel for bucket in found)
            if total == numel:
                return found
            tried[f"bucket size {candidate}"] = total
    raise CheckpointError(
        f"{where}: holds {numel} elements; tried {tried}. The flat buffer cannot be decoded: the "
        "model and its optimizer are of different runs, or parameters were frozen. Pass --optim "
        "drop to reshard the weights"
    )


def read_dist(
    opened: Opened,
    collector: Collector,
    flat: list[Stored],
    trusted: frozenset[str],
    rank_parameters: Any,
) -> None:
    """Read what :func:`torch_dist.read` left of the optimizer of ``torch_dist``.

    Args:
        opened: The checkpoint; its model-shaped optimizer tensors are read already.
        collector: Of its atoms.
        flat: Flat tensors (``dp_reshardable``).
        trusted: Names let through in pickles.
        rank_parameters: ``(opened, place) -> [[Parameter]]`` by chunk: what a rank would hold.
    """
    content = opened.common.get("content_metadata") or {}
    kind = content.get("distrib_optim_sharding_type")
    roles = {atom.role for atom in opened.tensors.atoms} - {WEIGHT}
    if flat:
        kind = "dp_reshardable"
    elif not roles:
        opened.notes.append("no optimizer state")
        return
    elif kind not in ("fully_reshardable", "fully_sharded_model_space"):
        kind = "plain"
    opened.optimizer = _dist_groups(opened, kind, trusted)
    if flat:
        for place, states in sorted(group_flat(flat).items()):
            _read_flat(opened, collector, place, states, rank_parameters)


def _dist_groups(opened: Opened, kind: str, trusted: frozenset[str]) -> OptimizerState:
    members = _dist_members(opened, trusted)
    groups = []
    for member in members:
        inner = member.get("optimizer", member)
        groups.append([_without_params(g) for g in inner["param_groups"]])
    step = groups[0][0].get("step")
    if step is None:
        first = members[0].get("optimizer", members[0])
        step = first.get("state", {}).get("common_step")
    expert = groups[1] if len(groups) > 1 else None
    return OptimizerState(kind, groups[0], expert, step, members[0].get("grad_scaler"))


def _dist_members(opened: Opened, trusted: frozenset[str]) -> list[dict[str, Any]]:
    """Non-tensor state of each optimizer: shared, or one object for each dp group."""
    common = opened.common.get("optimizer")
    members = optimizer_members(common)
    if members and all("param_groups" in m.get("optimizer", m) for m in members):
        return members
    found = []
    for prefix in ("chained_0.", "chained_1.", ""):
        key = f"{prefix}optimizer.distributed.dp_group_idx_0.optimizer/shard_0_1"
        if key in opened.objects:
            value, zipped, fd = read_object(opened.folder, opened.objects[key], key, trusted)
            try:
                found.append({"optimizer": pickles.inlined(value, fd, zipped)[0]})
            finally:
                os.close(fd)
    if not found:
        raise CheckpointError(
            f"{opened.folder}: optimizer tensors without parameter groups: the save is not "
            "complete. Pass --optim drop to reshard the weights"
        )
    return found


def place_of_group(layout: Layout, member: int, group: int) -> Coordinates:
    """Return the model-parallel place of ``dp_group_idx_{group}``."""
    if member == 0:
        # Without an optimizer of their own, experts are here too, cut as the dense tensors are.
        tp = group % layout.tp
        return Coordinates(tp, group // layout.tp, 0, tp % layout.expert_tp)
    etp, rest = group % layout.expert_tp, group // layout.expert_tp
    return Coordinates(0, rest // layout.ep, rest % layout.ep, etp)


def _read_flat(
    opened: Opened,
    collector: Collector,
    place: tuple[int, int, int],
    states: dict[str, dict[int, Stored]],
    rank_parameters: Any,
) -> None:
    member, group, buffer = place
    where = f"{opened.folder}: optimizer {member}, dp_group_idx {group}, buffer {buffer}"
    at = place_of_group(opened.layout, member, group)
    chunks = of_member(rank_parameters(opened, at), opened.layout, member)
    held = [chunk for chunk in chunks if chunk]
    if buffer >= len(held):
        raise CheckpointError(f"{where}: its arguments say {len(held)} buffers on that rank")
    lengths = _bucket_lengths(states, where)
    found = buffers.cut_by_lengths(held[buffer], lengths)
    if isinstance(found, str):
        raise CheckpointError(
            f"{where}: buckets of {lengths} elements do not fit the model: {found}. The order of "
            "parameters in that run is not known (frozen or unknown parameters?). Pass --optim "
            "drop to reshard the weights"
        )
    for state, by_bucket in states.items():
        for number, bucket in enumerate(found):
            _add_flat(collector, buffers.STATES[state], bucket, by_bucket[number], where)


def _bucket_lengths(states: dict[str, dict[int, Stored]], where: str) -> list[int]:
    """Return the buckets' lengths, on which the three states must agree."""
    by_state = {
        state: [stored.shape for _, stored in sorted(states.get(state, {}).items())]
        for state in buffers.STATES
    }
    if len({tuple(shapes) for shapes in by_state.values()}) > 1:
        raise CheckpointError(
            f"{where}: its states have buckets of unlike shapes, {by_state}: the save is not "
            "complete, or not of Adam. Pass --optim drop to reshard the weights"
        )
    return [length for (length,) in by_state["param"]]


def _add_flat(collector: Collector, role: str, bucket: Bucket, stored: Stored, where: str) -> None:
    """Add the parts of parameters that lie in each chunk of a bucket."""
    chunks = sorted(stored.chunks, key=lambda chunk: chunk.start)
    for parameter, start in bucket.starts:
        shape, end = parameter.array.shape, start + parameter.numel
        for chunk in chunks:
            first, last = max(chunk.start[0], start), min(chunk.start[0] + chunk.shape[0], end)
            for box, size, at in boxes_of_range(shape, first - start, last - start):
                offset = start + at - chunk.start[0]
                for part in parameter.array.parts(box, size, offset, row_major(shape)):
                    collector.add(role, part, chunk.record)
