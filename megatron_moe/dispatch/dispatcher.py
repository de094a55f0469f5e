"""What the layer calls: dispatch before the experts, combine after them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_moe.combine.restore import restore_copies, restore_gathered
from megatron_moe.dispatch.exchange import exchange
from megatron_moe.dispatch.permute import permute, permute_probs, unpermute
from megatron_moe.dispatch.plan import DispatchPlan, plan_dispatch, plan_gathered
from megatron_moe.parallel import collectives
from megatron_moe.parallel.groups import ExpertGroups
from megatron_moe.route.decision import Routing


class AllToAllDispatcher:
    """Each copy travels to the rank that owns its expert, and back."""

    def __init__(self, num_experts: int, groups: ExpertGroups) -> None:
        self.num_experts = num_experts
        self.groups = groups

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, DispatchPlan]:
        """Tokens to experts.

        Args:
            x_TD: This rank's tokens, ``(T, D)``.
            routing: Their decision.

        Returns:
            x_RD: Rows by local expert, ``(R, D)``.
            probs_R: Their weights.
            plan: To be given to :meth:`combine`; nothing is kept on the dispatcher.
        """
        plan = plan_dispatch(routing, self.groups)
        x_ND = permute(x_TD, plan.order)
        probs_N = permute_probs(routing.probs_TK, plan.order)
        return *exchange(x_ND, probs_N, plan, self.groups), plan

    def combine(self, y_RD: Tensor, plan: DispatchPlan) -> Tensor:
        """Weighted results back to their tokens, summed: the adjoint of :meth:`dispatch`."""
        return unpermute(restore_copies(y_RD, plan, self.groups), plan.order)


class AllGatherDispatcher:
    """All tokens of the TP × EP group come to every rank; results are reduce-scattered.

    Moves T · P rows whatever K is: the better choice when K is near the number of ranks.
    """

    def __init__(self, num_experts: int, groups: ExpertGroups) -> None:
        self.groups = groups
        self.num_local = num_experts // groups.ep.size()
        self.first_expert = groups.ep.rank() * self.num_local

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, DispatchPlan]:
        """As :meth:`AllToAllDispatcher.dispatch`; the plan's T is that of all ranks."""
        group = self.groups.tp_ep
        here = torch.tensor([x_TD.shape[0]], device=x_TD.device)
        sizes = collectives.gather_counts(here, group).flatten().tolist()
        kept_TK = routing.kept_TK
        everybody = replace(
            routing,
            indices_TK=collectives.all_gather(routing.indices_TK, sizes, group),
            probs_TK=collectives.all_gather(routing.probs_TK, sizes, group),
            # Empty rows to a common size serve equal splits, which a gather has anyway.
            capacity=None,
            kept_TK=None
            if kept_TK is None
            else collectives.all_gather(kept_TK.to(torch.uint8), sizes, group).bool(),
        )
        plan = plan_gathered(everybody, sizes, self.first_expert, self.num_local)
        x_AD = collectives.all_gather(x_TD, sizes, group)
        x_RD = permute(x_AD, plan.order)
        return x_RD, permute_probs(everybody.probs_TK, plan.order), plan

    def combine(self, y_RD: Tensor, plan: DispatchPlan) -> Tensor:
        """As :meth:`AllToAllDispatcher.combine`."""
        return restore_gathered(unpermute(y_RD, plan.order), plan, self.groups)


Dispatcher = AllToAllDispatcher | AllGatherDispatcher
DISPATCHERS: dict[str, type[AllToAllDispatcher] | type[AllGatherDispatcher]] = {
    "alltoall": AllToAllDispatcher,
    "allgather": AllGatherDispatcher,
}
