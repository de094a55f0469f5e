"""The losses of one router, attached to its weights and recorded in Megatron's tracker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe.parallel.groups import ExpertGroups
from megatron_moe.route.balance import BalanceLoss, balance_losses, summand, z_loss
from megatron_moe.route.decision import Picked
from megatron_moe.route.part import OwnLoss
from megatron_moe.route.scores import log_score
from megatron_moe.route.softmax import score_sums


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over a scope's tokens, fp64: exact for counts up to 2^53."""

    counts_E: Tensor
    scores_E: Tensor
    num_valid: Tensor

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.counts_E + other.counts_E,
            self.scores_E + other.scores_E,
            self.num_valid + other.num_valid,
        )

    def over_sequences(self) -> _Sums:
        return _Sums(self.counts_E.sum(0), self.scores_E.sum(0), self.num_valid.sum(0))

    def reduced(self, group: ProcessGroup) -> _Sums:
        """The sums over all ranks of the group, by one all-reduce."""
        if group.size() == 1:
            return self
        parts = (self.counts_E, self.scores_E, self.num_valid.unsqueeze(-1))
        both = torch.cat(parts, dim=-1)
        dist.all_reduce(both, group=group)
        num_experts = self.counts_E.shape[-1]
        counts_E, scores_E, num_valid = both.split([num_experts, num_experts, 1], dim=-1)
        return _Sums(counts_E, scores_E, num_valid.squeeze(-1))

    def loss(
        self, loss: BalanceLoss, score_sums_E: Tensor, num_valid: Tensor, num_ranks: int
    ) -> Tensor:
        """This rank's summand of a loss of these sums."""
        dtype = score_sums_E.dtype
        n = self.num_valid.clamp(min=1).unsqueeze(-1)
        choices = self.counts_E.sum(-1, keepdim=True).clamp(min=1)
        mean_E, shares_E = self.scores_E / n, self.counts_E / choices
        return summand(
            loss.function,
            score_sums_E,
            mean_E.to(dtype),
            shares_E.to(dtype),
            num_valid.to(dtype),
            num_ranks,
        )


class RouterLosses:
    """Every loss of one router; holds the running sums of the global batch.

    A loss reaches the gradients as ``coefficient · L`` averaged over micro-batches and
    data-parallel ranks, whatever the layout: Megatron's auto-scaler brings 1/micro-batches and
    the context-parallel factor, its DDP the mean over DP × CP, sequence parallelism the sum
    over TP, so each rank adds the summand of its own tokens.
    """

    def __init__(self, config: Any, moe: Any, groups: ExpertGroups) -> None:
        self.config = config
        self.groups = groups
        self.balance = balance_losses(config, moe)
        self.layer_weights: tuple[float, ...] = tuple(moe.balance_layer_weights)
        self.reset_global()

    def reset_global(self) -> None:
        """Start a new global batch."""
        self._so_far: _Sums | None = None

    def attach(
        self,
        probs_TK: Tensor,
        logits_TE: Tensor,
        picked: Picked,
        valid_T: Tensor | None,
        num_sequences: int,
        layer_place: int | None,
        own: Sequence[OwnLoss] = (),
    ) -> Tensor:
        """Hang every loss on the weights, so that their gradients arrive with the main loss's.

        Args:
            probs_TK: Weights, ``(T, K)``.
            logits_TE: Logits, ``(T, E)``.
            picked: The decision that is really carried out, before capacity; none of padding.
            valid_T: False for padding; None when there is none.
            num_sequences: B; T = S · B in sequence-major order.
            layer_place: Where the tracker books the values; None books nothing.
            own: Losses of the choice itself.

        Returns:
            ``probs_TK``, unchanged in value.

        Cost: one all-reduce of B · (2E + 1) numbers over the micro-batch's ranks, and one of
            2E + 1 over the global batch's where a loss has that scope; none without losses.
        """
        z_coeff = self.config.moe_z_loss_coeff
        found = list(own)
        num_valid = self._num_valid(logits_TE, valid_T) if self.balance or z_coeff or own else 0
        logsumexp_T = None
        if self.balance:
            function = self.config.moe_router_score_function
            sums_BE, denominators_T = score_sums(
                log_score(logits_TE, function), valid_T, num_sequences
            )
            found += self._balance_losses(sums_BE, picked, valid_T, layer_place)
            # For softmax scores the z-loss is of the same denominators: no second pass.
            logsumexp_T = denominators_T if function == "softmax" else None
        if z_coeff:
            z = z_loss(logits_TE, num_valid, valid_T, logsumexp_T)
            found.append(OwnLoss("z_loss", z_coeff, z))
        for loss in found:
            probs_TK = self._hang(probs_TK, loss, num_valid, layer_place)
        return probs_TK

    def _balance_losses(
        self,
        score_sums_BE: Tensor,
        picked: Picked,
        valid_T: Tensor | None,
        layer_place: int | None,
    ) -> list[OwnLoss]:
        num_sequences, num_experts = score_sums_BE.shape
        mine = _Sums(
            _counts_by_sequence(picked, num_sequences, num_experts).double(),
            score_sums_BE.detach().double(),
            _valid_by_sequence(picked.indices_TK, valid_T, num_sequences).double(),
        )
        sequences = None
        if any(loss.scope != "global" for loss in self.balance):
            sequences = mine.reduced(self.groups.tp_cp)
        if any(loss.scope == "global" for loss in self.balance):
            now = mine.over_sequences().reduced(self.groups.tp_dp_cp)
            self._so_far = now if self._so_far is None else self._so_far + now
        found = []
        for loss in self.balance:
            if loss.scope == "global":
                value = self._global(loss, score_sums_BE.sum(0), now.num_valid)
            else:
                assert sequences is not None
                value = self._micro_batch(loss, sequences, score_sums_BE)
            coeff = loss.coeff * self._layer_weight(layer_place)
            found.append(OwnLoss(loss.log_name, coeff, value))
        return found

    def _micro_batch(self, loss: BalanceLoss, sums: _Sums, score_sums_BE: Tensor) -> Tensor:
        """L of the micro-batch, or the mean over its sequences of each one's own L."""
        num_ranks = self.groups.tp_cp.size()
        if loss.scope == "sequence":
            return sums.loss(loss, score_sums_BE, sums.num_valid, num_ranks).mean()
        sums = sums.over_sequences()
        return sums.loss(loss, score_sums_BE.sum(0), sums.num_valid, num_ranks)

    def _global(self, loss: BalanceLoss, score_sums_E: Tensor, num_now: Tensor) -> Tensor:
        """P and f over the global batch so far; the gradient goes to this micro-batch's scores.

        DDP takes the mean over DP, so a rank's n is that of *its* micro-batch, a DP-th of all:
        with the n of all ranks the gradient would come out as 1/DP.
        """
        assert self._so_far is not None
        num_ranks = self.groups.tp_cp.size()
        dp_size = self.groups.tp_dp_cp.size() // num_ranks
        return self._so_far.loss(loss, score_sums_E, num_now / dp_size, num_ranks)

    def _num_valid(self, logits_TE: Tensor, valid_T: Tensor | None) -> Tensor | int:
        """Valid tokens of the micro-batch, over its ranks."""
        group = self.groups.tp_cp
        if valid_T is None:  # Megatron gives all ranks of a micro-batch equal slices
            return logits_TE.shape[0] * group.size()
        num_valid = valid_T.sum()
        if group.size() > 1:
            dist.all_reduce(num_valid, group=group)
        return num_valid

    def _layer_weight(self, layer_place: int | None) -> float:
        if not self.layer_weights or layer_place is None:
            return 1.0
        return self.layer_weights[layer_place - 1]

    def _hang(
        self,
        probs_TK: Tensor,
        loss: OwnLoss,
        num_valid: Tensor | int,
        layer_place: int | None,
    ) -> Tensor:
        c = self.config
        mtp_layers = c.mtp_num_layers or 0
        value = loss.value
        if layer_place is not None and layer_place > c.num_layers and c.mtp_use_repeated_layer:
            value = value / mtp_layers  # one MTP layer runs mtp_layers times
        get_moe_metrics_tracker().record(
            loss.name,
            value,
            layer_place,
            c.num_layers + mtp_layers,
            reduce_group=self.groups.tp_cp,
        )
        scaled = loss.coeff * value
        if c.calculate_per_token_loss:
            # Megatron divides all gradients by the global token count instead of averaging over
            # micro-batches and DP: this micro-batch's share of that count restores the mean.
            scaled = scaled * num_valid
        return MoEAuxLossAutoScaler.apply(probs_TK, scaled)


def _counts_by_sequence(picked: Picked, num_sequences: int, num_experts: int) -> Tensor:
    """Choices of each expert in each sequence, ``(B, E)`` int64; token t is of sequence t mod B."""
    slots_TK = picked.indices_TK
    if num_sequences > 1:
        tokens_T = torch.arange(slots_TK.shape[0], device=slots_TK.device)
        slots_TK = (tokens_T % num_sequences).unsqueeze(1) * num_experts + slots_TK
    slots = slots_TK.flatten() if picked.chosen_TK is None else slots_TK[picked.chosen_TK]
    counts = torch.bincount(slots, minlength=num_sequences * num_experts)
    return counts.view(num_sequences, num_experts)


def _valid_by_sequence(x_TK: Tensor, valid_T: Tensor | None, num_sequences: int) -> Tensor:
    """Valid tokens of each sequence, ``(B,)`` int64."""
    if valid_T is None:
        num_tokens = x_TK.shape[0] // num_sequences
        return torch.full((num_sequences,), num_tokens, device=x_TK.device)
    return valid_T.unflatten(0, (-1, num_sequences)).sum(0)
