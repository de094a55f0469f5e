"""Which tokens a rule looks at: those of a micro-batch, of one sequence, of a global batch.

A micro-batch lies on the tensor × context parallel ranks that share its sequences; a global batch
on the data-parallel ranks too, one micro-batch of each at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe.parallel.collectives import all_gather, gather_counts
from megatron_moe.parallel.groups import ExpertGroups

SCOPES = ("micro_batch", "sequence", "global")


def ranks_of(scope: str, groups: ExpertGroups) -> ProcessGroup:
    """The ranks that the tokens of a scope lie on.

    Raises:
        ValueError: Unknown scope.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope ({scope}) must be one of {', '.join(SCOPES)}")
    return groups.tp_dp_cp if scope == "global" else groups.tp_cp


@dataclass(frozen=True, slots=True)
class Gathered:
    """Rows of all ranks of a scope, and which of them are this rank's.

    Args:
        rows: ``(A, ...)``, in rank order.
        valid_A: False for padding; None when there is none anywhere.
        mine: This rank's rows.
    """

    rows: Tensor
    valid_A: Tensor | None
    mine: slice


def gather_scope(x_T: Tensor, valid_T: Tensor | None, group: ProcessGroup) -> Gathered:
    """Bring together the rows of the ranks of a scope; every rank of the group calls it.

    Args:
        x_T: This rank's rows, ``(T, ...)``, without gradient.
        valid_T: False for padding, or None.
        group: The ranks.

    Cost: nothing with one rank; else one all-gather of the sizes (a host sync) and of the rows.
    """
    if group.size() == 1:
        return Gathered(x_T, valid_T, slice(None))
    padded = int(valid_T is not None)
    here = torch.tensor([x_T.shape[0], padded], device=x_T.device)
    sizes, anywhere = gather_counts(here, group).t().tolist()
    first = sum(sizes[: group.rank()])
    valid_A = None
    if any(anywhere):
        if valid_T is None:
            valid_T = torch.ones(x_T.shape[0], dtype=torch.bool, device=x_T.device)
        valid_A = all_gather(valid_T.to(torch.uint8), sizes, group).bool()
    rows = all_gather(x_T.contiguous(), sizes, group)
    return Gathered(rows, valid_A, slice(first, first + x_T.shape[0]))
