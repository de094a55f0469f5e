"""Sizes of the study: the model, the text, the steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every variant has in common.

    Args:
        layers: Transformer layers, each with experts.
        hidden: Width of the model.
        heads: Attention heads.
        experts: Experts in a layer.
        topk: Experts that a token visits.
        expert_ffn: Width of one expert.
        seq_length: Tokens of a sequence.
        micro_batch: Sequences of a micro-batch; scopes of losses and capacity follow it.
        num_micro_batches: Micro-batches of a step, so that micro-batch and global scope differ.
        vocab_size: Tokens of the learned vocabulary.
        text_mb: Megabytes of text.
        steps: Updates of a run.
        seeds: Runs of each variant.
        measurements: How often in a run validation loss, load and churn are taken.
        validation_sequences: Sequences of the fixed validation set, also the churn's probe.
        learning_rate: Its peak.
        chosen: Variants to run; empty for all.
    """

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    experts: int = 8
    topk: int = 2
    expert_ffn: int = 128
    seq_length: int = 64
    micro_batch: int = 4
    num_micro_batches: int = 2
    vocab_size: int = 1024
    text_mb: int = 5
    steps: int = 400
    seeds: int = 3
    measurements: int = 20
    validation_sequences: int = 64
    learning_rate: float = 3e-3
    chosen: tuple[str, ...] = ()

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step trains on."""
        return self.micro_batch * self.num_micro_batches * self.seq_length

    @property
    def chance_variance(self) -> float:
        """Variance of a step's relative load if each choice fell on an expert by pure chance.

        Choices are distinct within a token, which makes it a little smaller than a multinomial's.
        """
        draws = self.tokens_per_step * self.topk
        return (self.experts - self.topk) / draws

    def measured_steps(self) -> list[int]:
        """Steps after which a measurement is taken; the last step is one of them."""
        spacing = max(1, round(self.steps / self.measurements))
        return sorted({*range(self.steps, 0, -spacing)})
