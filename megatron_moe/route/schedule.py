"""What changes with the iteration: fading noise, a first phase for the gate, a frozen router."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_moe.route.part import RouterPart


class Schedule(RouterPart):
    """Counts global batches in the checkpoint, so that every boundary is exact across restarts.

    A phase belongs to an iteration: with ``gate_pretrain_iters`` N, iterations 1 … N train the
    router alone, also when the run was stopped and went on in between.
    """

    def __init__(self, config: Any, moe: Any) -> None:
        self.jitter: float = config.moe_input_jitter_eps or 0.0
        self.noise: float = moe.logit_noise_std
        self.anneal_iters: int = moe.noise_anneal_iters
        self.pretrain_iters: int = moe.gate_pretrain_iters
        self.freeze_iter: int = moe.router_freeze_iter
        self.needed = bool(
            self.pretrain_iters
            or self.freeze_iter >= 0
            or (self.anneal_iters and (self.jitter or self.noise))
            or moe.routing_record
            or moe.routing_replay
            or moe.sparse_experts != "none"  # the experts' schedule goes by the same count
        )
        self._finished: int | None = 0

    def buffers(self) -> dict[str, Tensor]:
        """Global batches finished; kept only where something depends on it."""
        if not self.needed:
            return {}
        self._finished = None  # a checkpoint may bring another number than 0
        return {"routing_step": torch.zeros(1, dtype=torch.int64)}

    @property
    def finished(self) -> int:
        """Global batches finished; read from the device once after each load."""
        if self._finished is None:
            self._finished = int(self.state["routing_step"])
        return self._finished

    def loaded(self) -> None:
        """The buffer was changed from outside, by a checkpoint."""
        if self.needed:
            self._finished = None

    @property
    def gate_only(self) -> bool:
        """Whether this iteration trains the router alone."""
        return self.finished < self.pretrain_iters

    @property
    def frozen(self) -> bool:
        """Whether the router no longer learns."""
        return 0 <= self.freeze_iter <= self.finished

    @property
    def noise_share(self) -> float:
        """How much of the noise is left, from 1 to 0."""
        if not self.anneal_iters:
            return 1.0
        return max(0.0, 1.0 - self.finished / self.anneal_iters)

    def jittered(self, input: Tensor) -> Tensor:
        """The hidden states times uniform noise around 1, as in the Switch Transformer."""
        eps = self.jitter * self.noise_share
        if not eps:
            return input
        return input * torch.empty_like(input).uniform_(1.0 - eps, 1.0 + eps)

    def noisy(self, logits: Tensor) -> Tensor:
        """The logits plus normal noise."""
        std = self.noise * self.noise_share
        return logits + std * torch.randn_like(logits) if std else logits

    def end_batch(self, summed: Tensor | None) -> None:
        """One more."""
        if self.needed:
            self._finished = self.finished + 1
            self.state["routing_step"].fill_(self._finished)
