"""Real text as tokens: the source of Python's standard library, by ``megatron-moe data``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_moe.tools.data.prepare import Request, prepare
from megatron_moe.tools.data.progress import Progress
from megatron_moe.tools.study.plan import Plan

_VALIDATION_SHARE = 0.05


@dataclass(frozen=True)
class Text:
    """Tokens cut into windows of one token more than a sequence.

    Args:
        training: ``(N, S + 1)`` int64.
        validation: The fixed validation set, ``(V, S + 1)``; other files than the training's.
    """

    training: Tensor
    validation: Tensor

    def batches(self, plan: Plan, seed: int) -> list[Tensor]:
        """Return one ``(B, S + 1)`` batch a step, in an order that depends on the seed alone.

        Text that has been seen once comes again in another order.
        """
        generator = torch.Generator().manual_seed(seed)
        size = plan.micro_batch * plan.num_micro_batches
        order: list[Tensor] = []
        while sum(map(len, order)) < plan.steps * size:
            order.append(torch.randperm(len(self.training), generator=generator))
        rows = torch.cat(order)[: plan.steps * size]
        return [self.training[batch] for batch in rows.split(size)]


def make_text(plan: Plan, prefix: Path, progress: Progress) -> Text:
    """Make Megatron's token file, unless it is there already, and read it.

    Args:
        plan: Vocabulary, megabytes and lengths.
        prefix: Where the token file goes.
        progress: Told of the stages.

    Raises:
        DataError: What is at ``prefix`` was made with other options, or has too few tokens.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    request = Request(
        inputs=(), prefix=prefix, vocab_size=plan.vocab_size, limit_mb=plan.text_mb, workers=2
    )
    prepare(request, progress)
    documents = IndexedDataset(str(prefix))
    tokens = np.concatenate([documents[i] for i in range(len(documents))]).astype(np.int64)
    return cut(torch.from_numpy(tokens), plan)


def cut(tokens_N: Tensor, plan: Plan) -> Text:
    """Cut a stream of tokens into windows; the last of the text is set aside for validation."""
    width = plan.seq_length + 1
    windows = tokens_N[: len(tokens_N) // width * width].view(-1, width)
    aside = max(plan.validation_sequences, round(len(windows) * _VALIDATION_SHARE))
    if len(windows) <= aside:
        raise ValueError(
            f"the text has {len(windows)} sequences of {plan.seq_length} tokens, and "
            f"{aside} are wanted for validation alone; take more text"
        )
    # Spread over all that was set aside, not its first file only.
    places = torch.linspace(0, aside - 1, plan.validation_sequences).round().long()
    return Text(windows[:-aside], windows[-aside:][places])
