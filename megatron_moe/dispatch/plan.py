"""The record of one dispatch: counts, splits and orders, made once, never changed.

Shapes: T tokens of this rank, K choices a token, N copies sent, R copies received, E experts,
e local experts, P ranks of the EP group, Q ranks of the ETP group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.parallel.collectives import gather_counts
from megatron_moe.parallel.groups import ExpertGroups
from megatron_moe.route.capacity import place_in_expert
from megatron_moe.route.decision import Routing


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyOrder:
    """Which choice each copy is of, in expert order.

    Args:
        choice_N: Place of the choice in the flattened ``(T, K)`` decision, ``(N,)``; T · K stands
            for an empty row of a padded expert.
        token_N: Token of the copy, ``(N,)``; T for an empty row.
        num_tokens: T.
        copy_TK: The copy of each choice, ``(T, K)``, where every choice has one; else None.
        padded: Whether empty rows can occur.
    """

    choice_N: Tensor
    token_N: Tensor
    num_tokens: int
    copy_TK: Tensor | None
    padded: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchPlan:
    """One dispatch of one layer.

    Args:
        order: Token order → expert order.
        tokens_per_expert: Rows of each local expert after dispatch, ``(e,)`` int64 on the host.
        input_splits: Copies sent to each EP rank.
        output_splits: Copies received from each EP rank.
        etp_sizes: Copies that each ETP rank received, of which all gather.
        local_order_R: Source order → local-expert order, ``(R,)``; None where they are the same.
    """

    order: CopyOrder
    tokens_per_expert: Tensor
    input_splits: list[int]
    output_splits: list[int]
    etp_sizes: list[int]
    local_order_R: Tensor | None = None


def plan_dispatch(routing: Routing, groups: ExpertGroups) -> DispatchPlan:
    """Plan an all-to-all dispatch.

    Args:
        routing: The decision for this rank's tokens.
        groups: E must be a multiple of the EP size.

    Returns:
        The plan; every rank of the TP × EP group must call this together.

    Cost: one all-gather of E integers a rank over the TP × EP group; one host sync.
    """
    ep, etp = groups.ep, groups.etp
    num_local = routing.num_experts // ep.size()
    counts_E = _rows_per_expert(routing)
    # The one host sync of a dispatch; ranks run ETP fastest in the joint group.
    counts = gather_counts(counts_E, groups.tp_ep).cpu()
    counts_PQE = counts.view(ep.size(), etp.size(), routing.num_experts)
    mine = slice(ep.rank() * num_local, (ep.rank() + 1) * num_local)
    received_QPe = counts_PQE[:, :, mine].transpose(0, 1)
    sent = counts_PQE[ep.rank(), etp.rank()]
    return DispatchPlan(
        order=copy_order(routing, int(sent.sum())),
        tokens_per_expert=received_QPe.sum((0, 1)),
        input_splits=sent.view(ep.size(), num_local).sum(1).tolist(),
        output_splits=received_QPe[etp.rank()].sum(1).tolist(),
        etp_sizes=received_QPe.sum((1, 2)).tolist(),
        local_order_R=_local_order(received_QPe.flatten(0, 1), counts_E.device),
    )


def plan_gathered(
    routing: Routing, sizes: list[int], first_expert: int, num_local: int
) -> DispatchPlan:
    """Plan for the choices of *all* gathered tokens that fall on this rank's experts.

    Args:
        routing: The decision for the tokens of all ranks.
        sizes: Tokens of each rank, in the order they were gathered.
        first_expert: Global index of this rank's first expert.
        num_local: e.

    Returns:
        A plan whose splits say the tokens (not copies) of each rank.

    Cost: one host sync.
    """
    local_TK = routing.indices_TK - first_expert
    kept_TK = (local_TK >= 0) & (local_TK < num_local)
    if routing.kept_TK is not None:
        kept_TK = kept_TK & routing.kept_TK
    local = Routing(local_TK, routing.probs_TK, num_local, kept_TK)
    tokens_per_expert = local.tokens_per_expert().cpu()
    return DispatchPlan(
        order=copy_order(local, int(tokens_per_expert.sum())),
        tokens_per_expert=tokens_per_expert,
        input_splits=sizes,
        output_splits=sizes,
        etp_sizes=sizes,
    )


def copy_order(routing: Routing, num_copies: int) -> CopyOrder:
    """Sort the kept choices by expert, earlier tokens first.

    Args:
        routing: The decision.
        num_copies: N, the rows to send: kept choices, or E · capacity with padding.
    """
    num_tokens, topk = routing.indices_TK.shape
    expert_TK = routing.indices_TK
    if routing.kept_TK is not None:  # behind all experts, cut off below
        expert_TK = torch.where(routing.kept_TK, expert_TK, routing.num_experts)
    expert = expert_TK.flatten()
    # A narrow key sorts three times as fast as int64.
    key = expert.to(torch.int16) if routing.num_experts < 2**15 else expert
    choice = key.argsort(stable=True)
    copy_TK = None
    if routing.capacity is not None:
        choice_N = _pad_to_capacity(choice, expert, routing, num_copies)
    else:
        choice_N = choice[:num_copies]
        if routing.kept_TK is None:
            copies = torch.arange(num_copies, device=choice.device)
            copy_TK = torch.empty_like(choice).scatter_(0, choice, copies).view(num_tokens, topk)
    return CopyOrder(
        choice_N=choice_N,
        token_N=choice_N // topk,
        num_tokens=num_tokens,
        copy_TK=copy_TK,
        padded=routing.capacity is not None,
    )


def _rows_per_expert(routing: Routing) -> Tensor:
    if routing.capacity is None:
        return routing.tokens_per_expert()
    return torch.full((routing.num_experts,), routing.capacity, device=routing.indices_TK.device)


def _pad_to_capacity(choice: Tensor, expert: Tensor, routing: Routing, num_copies: int) -> Tensor:
    assert routing.capacity is not None
    place = place_in_expert(expert[choice], routing.num_experts)
    slot = expert[choice] * routing.capacity + place
    kept = expert[choice] < routing.num_experts
    slots = torch.full((num_copies,), expert.numel(), device=expert.device)
    slots[slot[kept]] = choice[kept]
    return slots


def _local_order(received_Xe: Tensor, device: torch.device) -> Tensor | None:
    """Rows arrive by source, then local expert; put one local expert's rows together.

    Args:
        received_Xe: Rows from each source for each local expert, ``(X, e)``, on the host.
        device: Where the order is used.
    """
    num_sources, num_local = received_Xe.shape
    if num_sources == 1 or num_local == 1:
        return None
    experts_Xe = torch.arange(num_local, dtype=torch.int16).expand(num_sources, num_local)
    expert_R = experts_Xe.flatten().repeat_interleave(received_Xe.flatten())
    return expert_R.argsort(stable=True).to(device)
