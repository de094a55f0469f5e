"""What a gate can learn before the experts do: which of them a token excites most.

While the gate is pre-trained, the experts stand still and cannot teach by the model's loss. But
each expert's first layer already answers a token more or less strongly, and the norm of that answer
tells which experts it concerns. The gate is distilled towards a softmax of these norms. They are
standardised for each expert over the tokens (a loud expert is not everybody's favourite), then for
each token over the experts.

    loss = mean over sampled tokens of KL(teacher ‖ balance scores)

Source: the norm as self-selection of experts, Lv et al. arXiv:2501.13074; the phase is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.parallel.collectives import all_gather
from megatron_moe.parallel.groups import ExpertGroups
from megatron_moe.route.decision import Picked
from megatron_moe.route.part import OwnLoss, RouterPart
from megatron_moe.route.schedule import Schedule
from megatron_moe.route.scores import balance_scores
from megatron_moe.route.tokens import Tokens

_SAMPLED_TOKENS = 64


class GateDistillation(RouterPart):
    """The distillation loss, while only the router learns.

    Args:
        coeff: Its coefficient.
        score_function: Of the router.
        schedule: Says whether the phase is on.
        groups: The layer's.

    Cost: in the phase, the first layers of the local experts for 64 tokens of each micro-batch,
    one all-gather and one all-reduce; afterwards nothing.
    """

    def __init__(
        self, coeff: float, score_function: str, schedule: Schedule, groups: ExpertGroups
    ) -> None:
        self.coeff = coeff
        self.score_function = score_function
        self.schedule = schedule
        self.groups = groups
        # First weights of the local experts, (F, D) each; set by the layer, which has the experts.
        self.first_weights: Callable[[], Sequence[Tensor]] | None = None

    def losses(self, tokens: Tokens, picked: Picked) -> list[OwnLoss]:
        """KL divergence of the scores from the experts' own preference."""
        if not self.schedule.gate_only or self.first_weights is None or not self.coeff:
            return []
        assert tokens.inputs_TD is not None
        # A micro-batch gives as many, evenly spaced, however many ranks it lies on.
        per_rank = max(1, _SAMPLED_TOKENS // self.groups.tp_cp.size())
        rows_n, weight_n = _sampled(tokens, per_rank)
        inputs_nD = _rows(tokens.inputs_TD.detach(), rows_n)
        norms_nE = self._norms(inputs_nD, tokens.logits_TE.shape[1])
        answers_nE = norms_nE.sqrt().double()
        sums = torch.stack([answers_nE, answers_nE.square(), torch.ones_like(answers_nE)])
        sums = (sums * weight_n.view(1, -1, 1)).sum(1)
        if self.groups.tp_cp.size() > 1:
            dist.all_reduce(sums, group=self.groups.tp_cp)
        teacher_nE = preference(answers_nE, sums).to(tokens.logits_TE.dtype)
        scores_nE = balance_scores(_rows(tokens.logits_TE, rows_n), self.score_function)
        lowest = torch.finfo(scores_nE.dtype).tiny
        surprise_nE = teacher_nE.clamp(min=lowest).log() - scores_nE.clamp(min=lowest).log()
        kl_n = (teacher_nE * surprise_nE).sum(1)
        total = sums[2, 0].clamp(min=1).to(kl_n.dtype)
        return [OwnLoss("gate_distill_loss", self.coeff, (kl_n * weight_n).sum() / total)]

    @torch.no_grad()
    def _norms(self, x_nD: Tensor, num_experts: int) -> Tensor:
        """Squared norm of every expert's first layer for these tokens, ``(n, E)``."""
        assert self.first_weights is not None
        group = self.groups.tp_ep
        everyone_AD = all_gather(x_nD, [len(x_nD)] * group.size(), group)
        weights = list(self.first_weights())
        first = self.groups.ep.rank() * len(weights)
        norms_AE = everyone_AD.new_zeros(len(everyone_AD), num_experts, dtype=torch.float32)
        for place, weight_FD in enumerate(weights):
            answer_AF = everyone_AD.to(weight_FD.dtype) @ weight_FD.t()
            norms_AE[:, first + place] = answer_AF.float().square().sum(1)
        if group.size() > 1:
            dist.all_reduce(norms_AE, group=group)
        return norms_AE.chunk(group.size())[group.rank()]


def preference(answers_nE: Tensor, sums: Tensor) -> Tensor:
    """Teacher distribution ``(n, E)`` of tokens by how strongly experts answer them.

    Args:
        answers_nE: Norms of the experts' answers.
        sums: Over the tokens of the micro-batch: of the norms, of their squares, of ones,
            ``(3, E)``.
    """
    count_E = sums[2].clamp(min=1)
    mean_E = sums[0] / count_E
    spread_E = (sums[1] / count_E - mean_E.square()).clamp(min=0).sqrt()
    relative_nE = (answers_nE - mean_E) / spread_E.clamp(min=1e-6)
    relative_nE = relative_nE - relative_nE.mean(1, keepdim=True)
    spread_n1 = relative_nE.std(1, correction=0, keepdim=True)
    return torch.softmax(relative_nE / spread_n1.clamp(min=1e-6), dim=1)


def _rows(x_TX: Tensor, rows_n: Tensor) -> Tensor:
    """Those rows; zeros where there is no row at all."""
    return x_TX[rows_n] if len(x_TX) else x_TX.new_zeros(len(rows_n), x_TX.shape[1])


def _sampled(tokens: Tokens, count: int) -> tuple[Tensor, Tensor]:
    """Places of a fixed number of tokens, evenly spaced, and which of them are real, as 0 or 1.

    The number is the same on every rank, so that all can gather.
    """
    num_tokens = tokens.logits_TE.shape[0]
    device = tokens.logits_TE.device
    slots = torch.arange(count, device=device)
    rows_n = slots * num_tokens // count if num_tokens >= count else slots
    real_n = rows_n < num_tokens
    rows_n = rows_n.clamp(max=max(num_tokens - 1, 0))
    if tokens.valid_T is not None and num_tokens:
        real_n = real_n & tokens.valid_T[rows_n]
    return rows_n, real_n.to(tokens.logits_TE.dtype)


def distillation_of(
    config: Any, moe: Any, schedule: Schedule, groups: ExpertGroups
) -> GateDistillation | None:
    """The distillation that the options ask for."""
    if not moe.gate_pretrain_iters:
        return None
    function = config.moe_router_score_function
    return GateDistillation(moe.gate_distill_coeff, function, schedule, groups)
