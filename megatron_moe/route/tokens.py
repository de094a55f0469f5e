"""What the parts of a router may look at: one micro-batch of this rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One micro-batch of this rank, T = S · B tokens in sequence-major order.

    Args:
        logits_TE: Router logits, ``(T, E)``.
        valid_T: False for padding; None when there is none.
        num_sequences: B; token t is of sequence t mod B.
        training: Whether this is the one pass of a training step that decides.
        bias_TE: Added to what experts are ranked by, never to weights: ``(E,)`` or ``(T, E)``.
        token_ids_T: Vocabulary ids, where a part asked for them.
        contexts_T: A hash of each token's last few ids, where a part asked for them.
        inputs_TD: What the gate saw; None where only logits were given.
    """

    logits_TE: Tensor
    valid_T: Tensor | None = None
    num_sequences: int = 1
    training: bool = True
    bias_TE: Tensor | None = None
    token_ids_T: Tensor | None = None
    contexts_T: Tensor | None = None
    inputs_TD: Tensor | None = None

    def ranked_with(self, bias_TE: Tensor) -> Tokens:
        """The same, with this bias."""
        return replace(self, bias_TE=bias_TE)
