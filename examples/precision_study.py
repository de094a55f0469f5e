"""What does a precision do to the loss? An experiment that anyone can repeat on a CPU.

    python examples/precision_study.py --quick     # 7 precisions, one seed: under 2 minutes
    python examples/precision_study.py             # all 11, three seeds: about 10 on two idle cores
    python examples/precision_study.py --variants fp8-blockwise --steps 1000 --seeds 5

The same small GPT learns the same real text (the source of Python's standard library) in fp32, in
bf16, in fp16 with a dynamic loss scale, with its experts in each FP8 recipe, emulated, and with 2:4
sparse experts. Model, schedule and optimizer are Megatron's. What comes out, in
``runs/precision_study``: a table (console, CSV), every measurement (JSON), a picture (PNG, SVG),
and what the figures say in words, with 95 % intervals over seeds, also where a difference cannot
be told from noise. ``docs/precision_study.md`` reads one such run.

FP8 is imitated, number by number: that shows what it does to a loss, and not how fast it is.

The parts are in ``tools/study``; a precision of your own is one line in its ``precisions.py``.
Needs matplotlib: ``pip install 'megatron-moe[study]'``.
"""

from megatron_moe.tools.study.command import study_command
from megatron_moe.tools.study.precisions import PRECISION

if __name__ == "__main__":
    study_command(PRECISION)()
