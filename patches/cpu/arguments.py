"""The defaults of Megatron's flags that suit a CPU."""

import argparse
from collections.abc import Callable

from megatron_moe.cpu_flags import CPU_FLAGS
from megatron_moe.mcore.patching import Patch


def _add_megatron_arguments(
    original: Callable[[argparse.ArgumentParser], argparse.ArgumentParser],
    parser: argparse.ArgumentParser,
) -> argparse.ArgumentParser:
    parser = original(parser)
    parser.set_defaults(**{flag.dest: flag.value for flag in CPU_FLAGS})
    return parser


PATCHES = (
    Patch(
        target="megatron.training.arguments.add_megatron_arguments",
        wrapper=_add_megatron_arguments,
        reason="the defaults ask for NCCL, Transformer Engine and fused kernels",
        retire_when="Megatron chooses these defaults by the device it finds",
        versions=">=0.19,<0.20",
        fingerprints=("580b80fbe586",),
    ),
)
