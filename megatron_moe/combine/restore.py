"""Expert results back to the ranks and places their copies came from."""

from __future__ import annotations

from torch import Tensor

from megatron_moe.dispatch.exchange import restore
from megatron_moe.dispatch.plan import DispatchPlan
from megatron_moe.parallel import collectives
from megatron_moe.parallel.groups import ExpertGroups


def restore_copies(y_RD: Tensor, plan: DispatchPlan, groups: ExpertGroups) -> Tensor:
    """Send each result back to where its copy came from.

    Args:
        y_RD: Results by local expert, ``(R, D)``; with ETP each rank's is a summand.
        plan: The plan of the dispatch.
        groups: The layer's groups.

    Returns:
        Results in the sender's expert order, ``(N, D)``.

    Cost: one all-to-all of R · D elements, and with ETP one reduce-scatter.
    """
    if plan.local_order_R is not None:
        y_RD = restore(y_RD, plan.local_order_R)
    y = collectives.reduce_scatter(y_RD, plan.etp_sizes, groups.etp)
    return collectives.all_to_all(y, plan.output_splits, plan.input_splits, groups.ep)


def restore_gathered(y_AD: Tensor, plan: DispatchPlan, groups: ExpertGroups) -> Tensor:
    """Sum the summands of all ranks and keep this rank's tokens, ``(A, D)`` → ``(T, D)``.

    Cost: one reduce-scatter of A · D elements, A the tokens of the TP × EP group.
    """
    return collectives.reduce_scatter(y_AD, plan.etp_sizes, groups.tp_ep)
