"""The process groups of a MoE layer, by name, checked and brought up once."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertGroups:
    """Groups of one MoE layer.

    Args:
        ep: Expert parallel: its ranks hold different experts (Megatron's ``ep``).
        etp: Expert tensor parallel: its ranks hold slices of the same experts (``expt_tp``).
        edp: Expert data parallel: its ranks hold the same experts (``expt_dp``).
        tp_ep: Expert tensor × expert parallel: everybody whose tokens meet here (``tp_ep``).
            Ranks run ETP fastest: place = ep_rank · etp_size + etp_rank.
        tp_cp: The ranks that share one micro-batch: tensor × context parallel (``tp_cp``).
        tp_dp_cp: The ranks that share one global batch (``tp_dp_cp``).
    """

    ep: ProcessGroup
    etp: ProcessGroup
    edp: ProcessGroup | None
    tp_ep: ProcessGroup
    tp_cp: ProcessGroup
    tp_dp_cp: ProcessGroup

    @classmethod
    def from_collection(cls, pg_collection: Any) -> ExpertGroups:
        """Read the groups from a Megatron ``ProcessGroupCollection``.

        Raises:
            ValueError: The collection lacks a group that a MoE layer needs.
        """
        names = {
            "ep": "ep",
            "etp": "expt_tp",
            "edp": "expt_dp",
            "tp_ep": "tp_ep",
            "tp_cp": "tp_cp",
            "tp_dp_cp": "tp_dp_cp",
        }
        found: dict[str, Any] = {
            ours: getattr(pg_collection, theirs, None) for ours, theirs in names.items()
        }
        missing = [names[k] for k, group in found.items() if group is None and k != "edp"]
        if missing:
            raise ValueError(
                f"the process-group collection lacks {', '.join(missing)}; "
                "call initialize_model_parallel() first, or pass a collection that has them"
            )
        return cls(**found)

    def check(self, num_experts: int) -> None:
        """Check the sizes against the model.

        Raises:
            ValueError: The experts cannot be dealt out evenly, or ETP × EP ≠ the joint group.
        """
        ep = self.ep.size()
        if num_experts % ep:
            legal = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
            raise ValueError(
                f"expert_model_parallel_size ({ep}) must divide num_moe_experts ({num_experts}); "
                f"legal values are {legal}"
            )
        if self.tp_ep.size() != ep * self.etp.size():
            raise ValueError(
                f"the joint expert group has {self.tp_ep.size()} ranks, but expert parallel "
                f"({ep}) × expert tensor parallel ({self.etp.size()}) is {ep * self.etp.size()}"
            )

    def bring_up(self) -> None:
        """Run one tiny collective on every group, in one order on all ranks.

        NCCL builds a communicator at a group's first collective; when that first one happens
        deep in a pipeline, ranks reach it in different orders and hang.

        Cost: one all-reduce of one element per distinct group; once per process.
        """
        for group in _distinct(self):
            if group not in _BROUGHT_UP:
                device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
                dist.all_reduce(torch.zeros(1, device=device), group=group)
                _BROUGHT_UP.add(group)


# A communicator is up, or not, for the whole process.
_BROUGHT_UP: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()


def _distinct(groups: ExpertGroups) -> list[ProcessGroup]:
    named = (groups.ep, groups.etp, groups.edp, groups.tp_ep, groups.tp_cp, groups.tp_dp_cp)
    return list(dict.fromkeys(g for g in named if g is not None and g.size() > 1))


def is_ordinary_expert(tp_size: int, etp_size: int, ep_size: int) -> bool:
    """Whether expert parameters are reduced like all others (Megatron's ``allreduce`` mark).

    With EP = 1 and ETP = TP an expert's replicas are exactly the ordinary data-parallel ranks.
    """
    return ep_size == 1 and etp_size == tp_size
