"""The losses of one router, attached to its weights and recorded in Megatron's tracker."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe.parallel.groups import ExpertGroups
from megatron_moe.route.balance import switch_loss, z_loss
from megatron_moe.route.scores import balance_scores

_LOG_NAMES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


class BalanceLosses:
    """Balancing losses by Megatron's options; holds the running counts of the global batch.

    Every loss reaches the gradients as ``coefficient · L`` averaged over micro-batches and
    data-parallel ranks, whatever the layout: Megatron's auto-scaler brings 1/micro-batches and
    the context-parallel factor, its DDP the mean over DP × CP, sequence parallelism the sum
    over TP, so each rank adds the summand of its own tokens.
    """

    def __init__(self, config: Any, groups: ExpertGroups) -> None:
        self.config = config
        self.groups = groups
        kinds, coeffs = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
        if isinstance(kinds, str):
            kinds, coeffs = [kinds], [coeffs]
        self.coeffs = {k: c for k, c in zip(kinds, coeffs, strict=True) if c and k in _LOG_NAMES}
        self.reset_global_counts()

    def reset_global_counts(self) -> None:
        """Start a new global batch."""
        self._global_counts_E: Tensor | int = 0
        self._global_valid: Tensor | int = 0

    def attach(
        self,
        probs_TK: Tensor,
        logits_TE: Tensor,
        indices_TK: Tensor,
        valid_T: Tensor | None,
        num_sequences: int,
        layer_place: int | None,
    ) -> Tensor:
        """Hang every loss on the weights, so that their gradients arrive with the main loss's.

        Args:
            probs_TK: Weights, ``(T, K)``.
            logits_TE: Logits, ``(T, E)``.
            indices_TK: The decision that is really carried out, ``(T, K)``.
            valid_T: False for padding; None when there is none.
            num_sequences: B; T = S · B in sequence-major order.
            layer_place: Where the tracker books the values; None books nothing.

        Returns:
            ``probs_TK``, unchanged in value.

        Cost: one all-reduce of B · E counts per kind of loss; none without losses.
        """
        z_coeff = self.config.moe_z_loss_coeff
        if not self.coeffs and not z_coeff:
            return probs_TK
        micro_valid = self._num_valid(logits_TE, valid_T, self.groups.tp_cp)
        if self.coeffs:
            scores_TE = balance_scores(logits_TE, self.config.moe_router_score_function)
            if valid_T is not None:
                scores_TE = scores_TE * valid_T.unsqueeze(1)
            counts_BE = _counts_by_sequence(indices_TK, valid_T, num_sequences, scores_TE.shape[1])
        for kind, coeff in self.coeffs.items():
            if kind == "aux_loss":
                loss = self._micro_batch(scores_TE, counts_BE, micro_valid)
            elif kind == "seq_aux_loss":
                loss = self._sequences(scores_TE, counts_BE, valid_T)
            else:
                loss = self._global_batch(scores_TE, counts_BE, valid_T)
            probs_TK = self._hang(probs_TK, coeff, loss, micro_valid, _LOG_NAMES[kind], layer_place)
        if z_coeff:
            loss = z_loss(logits_TE, micro_valid, valid_T)
            probs_TK = self._hang(probs_TK, z_coeff, loss, micro_valid, "z_loss", layer_place)
        return probs_TK

    def _micro_batch(self, scores_TE: Tensor, counts_BE: Tensor, num_valid: Tensor | int) -> Tensor:
        counts_E = _summed(counts_BE.sum(0), self.groups.tp_cp)
        return switch_loss(scores_TE, counts_E, num_valid, self.config.moe_router_topk)

    def _sequences(self, scores_TE: Tensor, counts_BE: Tensor, valid_T: Tensor | None) -> Tensor:
        """Mean over the micro-batch's B sequences of each sequence's own L."""
        shape = (-1, counts_BE.shape[0])
        counts_BE = _summed(counts_BE.clone(), self.groups.tp_cp)
        valid = counts_BE.new_ones(scores_TE.shape[0]) if valid_T is None else valid_T.long()
        num_valid_B = _summed(valid.unflatten(0, shape).sum(0), self.groups.tp_cp)
        losses_B = switch_loss(
            scores_TE.unflatten(0, shape), counts_BE, num_valid_B, self.config.moe_router_topk
        )
        return losses_B.mean()

    def _global_batch(self, scores_TE: Tensor, counts_BE: Tensor, valid_T: Tensor | None) -> Tensor:
        """Shares over the global batch so far, scores of this micro-batch.

        DDP takes the mean over DP, so a rank's summand is of the mean over *its* micro-batch:
        times DP, or the gradient would come out as 1/DP.
        """
        group = self.groups.tp_dp_cp
        now = self._num_valid(scores_TE, valid_T, group)
        self._global_counts_E = self._global_counts_E + _summed(counts_BE.sum(0), group)
        self._global_valid = self._global_valid + now
        valid = torch.as_tensor(self._global_valid, device=scores_TE.device).clamp(min=1)
        shares_E = self._global_counts_E / valid  # K · f_e
        dp_size = group.size() // self.groups.tp_cp.size()
        return dp_size * switch_loss(scores_TE, shares_E * now, now, self.config.moe_router_topk)

    def _num_valid(self, x_TE: Tensor, valid_T: Tensor | None, group: ProcessGroup) -> Tensor | int:
        if valid_T is None:  # Megatron gives all ranks of a micro-batch equal slices
            return x_TE.shape[0] * group.size()
        return _summed(valid_T.sum(), group)

    def _hang(
        self,
        probs_TK: Tensor,
        coeff: float,
        loss: Tensor,
        num_valid: Tensor | int,
        name: str,
        layer_place: int | None,
    ) -> Tensor:
        c = self.config
        mtp_layers = c.mtp_num_layers or 0
        if layer_place is not None and layer_place > c.num_layers and c.mtp_use_repeated_layer:
            loss = loss / mtp_layers  # one MTP layer runs mtp_layers times
        # Global L: the summand carries the factor DP; averaging over DP takes it out again.
        get_moe_metrics_tracker().record(
            name,
            loss,
            layer_place,
            c.num_layers + mtp_layers,
            reduce_group=self.groups.tp_cp,
        )
        scaled = coeff * loss
        if c.calculate_per_token_loss:
            # Megatron divides all gradients by the global token count instead of averaging over
            # micro-batches and DP: this micro-batch's share of that count restores the mean.
            scaled = scaled * num_valid
        return MoEAuxLossAutoScaler.apply(probs_TK, scaled)


def _counts_by_sequence(
    indices_TK: Tensor, valid_T: Tensor | None, num_sequences: int, num_experts: int
) -> Tensor:
    """Choices of each expert in each sequence, ``(B, E)`` int64; token t is of sequence t mod B."""
    tokens_T = torch.arange(indices_TK.shape[0], device=indices_TK.device)
    slots_TK = (tokens_T % num_sequences).unsqueeze(1) * num_experts + indices_TK
    if valid_T is not None:
        slots_TK = slots_TK[valid_T]
    counts = torch.bincount(slots_TK.flatten(), minlength=num_sequences * num_experts)
    return counts.view(num_sequences, num_experts)


def _summed(counts: Tensor, group: ProcessGroup) -> Tensor:
    if group.size() > 1:
        dist.all_reduce(counts, group=group)
    return counts
