"""Lay out a ``torch_dist`` checkpoint: global tensors in the chunks that its ranks will load."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

from megatron_moe.tools.checkpoint.model import buffers
from megatron_moe.tools.checkpoint.model.atoms import (
    MASTER,
    MOMENT1,
    MOMENT2,
    WEIGHT,
    AtomId,
    Part,
)
from megatron_moe.tools.checkpoint.model.boxes import Shape, boxes_of_range, row_major
from megatron_moe.tools.checkpoint.model.buffers import Bucket, Parameter
from megatron_moe.tools.checkpoint.model.catalogue import extra_state_owner
from megatron_moe.tools.checkpoint.model.inventory import Layer
from megatron_moe.tools.checkpoint.model.layout import Coordinates
from megatron_moe.tools.checkpoint.model.members import bucket_size, of_member
from megatron_moe.tools.checkpoint.model.ranks import Rank
from megatron_moe.tools.checkpoint.plan import state
from megatron_moe.tools.checkpoint.plan.globals import Global, Globals
from megatron_moe.tools.checkpoint.plan.output import Drop, Target
from megatron_moe.tools.checkpoint.plan.request import Resolved
from megatron_moe.tools.checkpoint.plan.torch_files import buffer_dtypes
from megatron_moe.tools.checkpoint.read.opened import Opened
from megatron_moe.tools.checkpoint.stored.dtypes import FLOAT32, DType


class DistTarget:
    """Lays the files out; ``build`` returns the target but for ``.metadata``'s bytes.

    Chunks that the source holds with the same bytes are taken over as they are; see
    :mod:`megatron_moe.tools.checkpoint.plan.keep`.
    """

    def __init__(self, source: Opened, to: Resolved, keep: Any) -> None:
        self.source, self.to, self.keep = source, to, keep
        self.target = Target()
        self.args = state.arguments(source, to)
        self.groups = state.member_groups(source, to) if to.optimizer else []
        self.rank = Rank(source.inventory, to.layout, to.style, to.vocabulary)
        self._tensors: dict[str, tuple[DType, Shape, list[tuple[Shape, Shape]]]] = {}

    def build(self) -> Target:
        """Return the whole target."""
        for tensor in Globals(self.source, self.to).all():
            self._put(tensor.key, WEIGHT, tensor, tensor.dtype)
            if tensor.trained and self.to.optimizer in ("plain", "fully_reshardable"):
                self._put_states(tensor)
        if self.to.optimizer == "dp_reshardable":
            self._flat()
        self._unknown()
        self._random_states()
        self._extra_states()
        self._other_objects()
        self._common()
        return self.keep.finish(self)

    def _put_states(self, tensor: Global) -> None:
        roles = [MOMENT1, MOMENT2]
        if self.to.optimizer == "fully_reshardable" or tensor.dtype != FLOAT32:
            roles.append(MASTER)
        for role in roles:
            self._put(self._state_key(role) + tensor.key, role, tensor, FLOAT32)

    def _state_key(self, role: str) -> str:
        """Return what stands before a model's key for its optimizer state."""
        master = "param" if self.to.optimizer == "fully_reshardable" else "fp32_param"
        return f"optimizer.state.{master if role == MASTER else role}."

    def _put(self, key: str, role: str, tensor: Global, dtype: DType) -> None:
        for start, shape, rank in tensor.chunks:
            parts = list(tensor.array.parts(start, shape))
            self.keep.chunk(self, key, start, shape, dtype, rank, [(role, p) for p in parts])
        self._describe(key, dtype, tensor.array.shape, [(s, n) for s, n, _ in tensor.chunks])

    def _describe(
        self, key: str, dtype: DType, shape: Shape, chunks: list[tuple[Shape, Shape]]
    ) -> None:
        self._tensors[key] = (dtype, shape, chunks)

    def _flat(self) -> None:
        """Buffers of the distributed optimizer, as ``dp_reshardable`` keeps them."""
        layout = self.to.layout
        for pp, stages in enumerate(self.to.stages):
            for tp in range(layout.tp):
                place = Coordinates(tp, pp, 0, tp % layout.expert_tp)
                chunks = [self.rank.parameters(stage, place) for stage in stages]
                mine = of_member(chunks, layout, 0)
                self._group(
                    0, tp + layout.tp * pp, pp, mine, layout.dp, pp * self._stage_ranks + tp
                )
            if len(self.groups) == 1:
                continue
            for ep, etp in product(range(layout.ep), range(layout.expert_tp)):
                place = Coordinates(etp % layout.tp, pp, ep, etp)
                chunks = [self.rank.parameters(stage, place) for stage in stages]
                mine = of_member(chunks, layout, 1)
                group = etp + layout.expert_tp * (ep + layout.ep * pp)
                rank = pp * self._stage_ranks + ep * layout.expert_tp + etp
                self._group(1, group, pp, mine, layout.expert_dp, rank)

    @property
    def _stage_ranks(self) -> int:
        return self.to.layout.tp * self.to.layout.dp

    def _group(
        self, member: int, group: int, pp: int, chunks: list[list[Parameter]], dp: int, rank: int
    ) -> None:
        prefix = f"chained_{member}." if len(self.groups) > 1 else ""
        prefix += f"optimizer.distributed.dp_group_idx_{group}."
        numels: list[dict[Any, list[int]]] = []
        unpadded: list[dict[Any, list[int]]] = []
        for v, parameters in enumerate(chunks):
            if not parameters:
                continue
            size = bucket_size(self.args, self.to.layout, pp, v)
            found = buffers.cut(parameters, size, dp)
            dtype = self.source.tensors.atoms[AtomId(next(parameters[0].array.names()))].dtype
            types = buffer_dtypes(dtype, self.args)
            shown = f"({types[0]!r}, {types[1]!r})"
            for k, bucket in enumerate(found):
                base = f"{prefix}gbuf_idx_{len(numels)}.dtype_{shown}.bucket_idx_{k}."
                for name, role in buffers.STATES.items():
                    self._bucket(base + name, role, bucket, dp, rank)
            numels.append({types: [buffers.padded(b.numel, dp) for b in found]})
            unpadded.append({types: [b.numel for b in found]})
        objects: dict[str, Any] = {
            "optimizer": {"param_groups": self.groups[member]},
            "per_bucket_numel": numels,
            "per_bucket_numel_unpadded": unpadded,
        }
        for name, value in state.with_scaler(self.source, objects).items():
            self.keep.object(self, f"{prefix}{name}/shard_0_1", value, rank)

    def _bucket(self, key: str, role: str, bucket: Bucket, dp: int, rank: int) -> None:
        """One chunk for each data-parallel rank: what it will load."""
        step = buffers.padded(bucket.numel, dp) // dp
        chunks = []
        for first in range(0, bucket.numel, step):
            last = min(first + step, bucket.numel)
            parts: list[tuple[str, Part]] = []
            gaps = last - first
            for parameter, start in bucket.starts:
                shape = parameter.array.shape
                begin, end = max(first, start), min(last, start + parameter.numel)
                gaps -= max(end - begin, 0)
                for box, size, at in boxes_of_range(shape, begin - start, end - start):
                    offset = start + at - first
                    found = parameter.array.parts(box, size, offset, row_major(shape))
                    parts += [(role, part) for part in found]
            shard = (last - first,)
            self.keep.chunk(self, key, (first,), shard, FLOAT32, rank, parts, gaps)
            chunks.append(((first,), (last - first,)))
        self._describe(key, FLOAT32, (bucket.numel,), chunks)

    def _unknown(self) -> None:
        """Tensors that no rule names keep their chunks, and their optimizer states."""
        for atom, held in self.source.tensors.atoms.items():
            if atom.name not in self.source.unknown:
                continue
            if atom.role != WEIGHT and self.to.optimizer not in ("plain", "fully_reshardable"):
                continue
            key = ("" if atom.role == WEIGHT else self._state_key(atom.role)) + atom.name
            boxes = [(extent.start, extent.shape) for extent in held.extents]
            for start, shape in boxes:
                part = Part(atom.name, held.shape, start, shape, 0, row_major(shape))
                self.keep.chunk(self, key, start, shape, held.dtype, 0, [(atom.role, part)])
            self._describe(key, held.dtype, held.shape, boxes)

    def _random_states(self) -> None:
        layout = self.to.layout
        for pp, tp in product(range(layout.pp), range(layout.tp)):
            value = state.random_state(self.source, self.to, pp, tp, self.target)
            if value is None:
                continue
            if self.to.dialect == "0.16" and layout.ep > 1:
                for dp in range(layout.dp):
                    at = f"{pp}.{tp}.{dp}_{layout.pp}.{layout.tp}.{layout.dp}"
                    self.keep.object(self, f"rng_state/shard_{at}", value, pp * self._stage_ranks)
            else:
                key = f"rng_state/shard_{pp}.{tp}_{layout.pp}.{layout.tp}"
                self.keep.object(self, key, value, pp * self._stage_ranks)

    @property
    def _keeps_extra_states(self) -> bool:
        """Whether FP8 states have the same keys in source and target."""
        return (
            self.source.location.form == "torch_dist"
            and not self.source.singletons
            and self.source.stacked_layers == self.to.stacked_layers
        )

    def _extra_states(self) -> None:
        """Empty FP8 states that modules ask for, where the source's cannot be taken over."""
        if self._keeps_extra_states:
            return
        if self.source.location.form == "torch_dist":
            self.target.dropped.append(
                Drop("FP8 states", "layers and experts are stacked otherwise; empty ones instead")
            )
        owners = self.source.extra_states | {"mlp.experts.linear_fc1", "mlp.experts.linear_fc2"}
        inventory = self.source.inventory
        total = len(inventory.layers)
        for number, layer in inventory.layers.items():
            stacked = self.to.stacked_layers
            prefix = "decoder.layers." if stacked else f"decoder.layers.{number}."
            at, of = (f"{number}", f"{total}") if stacked else ("", "")
            self._layer_extra(prefix, layer, owners, at, of)
        for number, layer in inventory.mtp.items():
            self._layer_extra(f"mtp.layers.{number}.transformer_layer.", layer, owners, "", "")
            if "eh_proj" in owners:
                key = f"mtp.layers.{number}.eh_proj._extra_state/shard_0_1"
                self.keep.object(self, key, None, 0)

    def _layer_extra(self, prefix: str, layer: Layer, owners: set[str], at: str, of: str) -> None:
        for owner in sorted(owners):
            if f"{owner}.weight" not in layer.kinds and owner != "self_attention.core_attention":
                continue
            name = f"{prefix}{owner}._extra_state/shard_"
            if owner.startswith("mlp.experts."):
                name = name.replace("mlp.experts.", "mlp.experts.experts.")
                for expert in range(layer.num_experts):
                    first = f"{at}." if at else ""
                    last = f"{of}." if of else ""
                    shard = f"{first}{expert}_{last}{layer.num_experts}"
                    self.keep.object(self, name + shard, None, 0)
            else:
                self.keep.object(self, f"{name}{at or 0}_{of or 1}", None, 0)

    def _other_objects(self) -> None:
        """Objects of ``torch_dist`` that are neither state by rule nor the optimizer's."""
        old, new = self.source.layout, self.to.layout
        same = (old.world_size, old.tp, old.pp) == (new.world_size, new.tp, new.pp)
        for key, place in self.source.objects.items():
            if re.match(r"(common_state|rng_state)/|(chained_\d+\.)?optimizer\.", key):
                continue
            if extra_state_owner(key) and not self._keeps_extra_states:
                continue
            if key.startswith("rerun_state_machine_state/") and not same:
                drop = Drop("rerun state machine", "it belongs to ranks that are gone")
                if drop not in self.target.dropped:
                    self.target.dropped.append(drop)
                continue
            self.keep.old_object(self, key, place)

    def _common(self) -> None:
        common = {key: value for key, value in self.source.common.items() if key != "optimizer"}
        common["args"] = self.args
        common.setdefault("checkpoint_version", 3.0)
        content = dict(common.get("content_metadata") or {})
        kind = self.to.optimizer
        content.pop("distrib_optim_sharding_type", None)
        if kind in ("dp_reshardable", "fully_reshardable"):
            content["distrib_optim_sharding_type"] = kind
        if kind == "fully_reshardable":
            content.setdefault("distrib_optim_fully_reshardable_mem_efficient", False)
        content["singleton_local_shards"] = False
        content["chained_optim_avoid_prefix"] = True
        common["content_metadata"] = content
        if kind:
            common["optimizer"] = self._optimizer_common()
        self.keep.common(self, common)

    def _optimizer_common(self) -> Any:
        members: list[dict[str, Any]] = []
        for groups in self.groups:
            if self.to.optimizer == "dp_reshardable":
                members.append({"param_state_sharding_type": "dp_reshardable"})
                continue
            inner: dict[str, Any] = {"param_groups": groups}
            if self.to.optimizer == "plain":
                members.append(self._plain_member(inner))
                continue
            member = {"optimizer": inner, "param_state_sharding_type": "fully_reshardable"}
            members.append(state.with_scaler(self.source, member))
        return members[0] if len(members) == 1 else dict(enumerate(members))

    def _plain_member(self, inner: dict[str, Any]) -> dict[str, Any]:
        optimizer = self.source.optimizer
        assert optimizer is not None
        if state.torch_adam(optimizer):
            inner["state"] = {"common_step": state.step_tensor(optimizer)}
        if not state.half_precision(self.args):
            return inner
        return state.with_scaler(self.source, {"optimizer": inner})
