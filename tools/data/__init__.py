"""Text in, Megatron's indexed dataset out: ``PREFIX.bin``, ``PREFIX.idx`` and a tokenizer.

The flow, one file a step: `sources` (which files) → `pieces` (bytes, cut at line ends) →
`encode` (bytes to token ids, in worker processes) → `prepare` (Megatron's own builder) →
`output` (moved into place, manifest last). `tokenizer` makes or loads the vocabulary, `cli` is
the command. Nothing here but the step that writes imports Megatron.
"""

from megatron_moe.tools.data.cli import command
from megatron_moe.tools.data.output import flags

__all__ = ["command", "flags"]
