"""Faults that a user can cause, found in the command line before any process is started.

Nothing here imports torch or Megatron: a wrong flag is answered in less than a second.
"""

import argparse
import ast
import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet

from megatron_moe.cpu_flags import check_cpu_flags
from megatron_moe.version import MEGATRON_VERSIONS

_TOKENIZERS_FROM_FILE = (
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "TikTokenizer",
)
_NUMBERS = (
    "--num-experts",
    "--moe-router-topk",
    "--expert-model-parallel-size",
    "--expert-tensor-parallel-size",
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--context-parallel-size",
    "--num-attention-heads",
    "--micro-batch-size",
    "--global-batch-size",
)
_DATA = ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path")
_FILES = ("--vocab-file", "--merge-file", "--data-args-path")


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes, as typed; ETP defaults to TP, as in Megatron."""

    tp: int
    pp: int
    cp: int
    ep: int
    etp: int

    @property
    def processes(self) -> int:
        """The smallest number of processes that fits; every multiple of it fits too."""
        return math.lcm(self.tp * self.pp * self.cp, self.etp * self.ep * self.pp)

    def __str__(self) -> str:
        """Return the sizes as they appear in messages."""
        return f"TP {self.tp}, PP {self.pp}, CP {self.cp}, EP {self.ep}, ETP {self.etp}"


def check_run(
    script: Path, argv: Sequence[str], device: str | None = None, world_size: int | None = None
) -> None:
    """Refuse a run that cannot work.

    Args:
        script: The training script.
        argv: Its arguments.
        device: ``cpu`` or ``cuda``; None while it is not known.
        world_size: Processes of the whole job; None while it is not known.

    Raises:
        ValueError: The first fault found, in one sentence with the way out.
    """
    if not script.is_file():
        raise ValueError(f"{script} does not exist; give the path of the training script")
    check_megatron(script)
    if device == "cpu":
        check_cpu_flags(argv)
    flags = read_flags(argv)
    check_experts(flags)
    if world_size is not None:
        check_layout(flags, world_size)
    check_files(flags)


def read_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Return the few of Megatron's flags that are checked here; others are left alone.

    Raises:
        ValueError: A number is not a number.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    for flag in _NUMBERS:
        parser.add_argument(flag, type=int)
    for flag in ("--tokenizer-type", "--tokenizer-model", "--moe-layer-impl", *_FILES):
        parser.add_argument(flag)
    for flag in _DATA:
        parser.add_argument(flag, nargs="*", default=[])
    for flag in ("--sequence-parallel", "--use-checkpoint-args", "--use-cpu-initialization"):
        parser.add_argument(flag, action="store_true")
    try:
        return parser.parse_known_args(list(argv))[0]
    except argparse.ArgumentError as fault:
        raise ValueError(f"{fault.argument_name}: {fault.message}") from None


def layout_of(flags: argparse.Namespace) -> Layout:
    """Return the parallel sizes that the flags ask for."""
    tp = flags.tensor_model_parallel_size or 1
    return Layout(
        tp=tp,
        pp=flags.pipeline_model_parallel_size or 1,
        cp=flags.context_parallel_size or 1,
        ep=flags.expert_model_parallel_size or 1,
        etp=flags.expert_tensor_parallel_size or tp,
    )


def check_experts(flags: argparse.Namespace) -> None:
    """Refuse a mixture of experts that does not add up.

    Raises:
        ValueError: The number of experts, top-k and the parallel sizes contradict each other.
    """
    layout, experts, topk = layout_of(flags), flags.num_experts, flags.moe_router_topk
    if not experts:
        if layout.ep > 1 and not flags.use_checkpoint_args:
            raise ValueError(
                f"--expert-model-parallel-size {layout.ep} needs --num-experts, "
                f"a multiple of {layout.ep}"
            )
        return
    if experts % layout.ep:
        below = experts // layout.ep * layout.ep
        legal = " or ".join(str(n) for n in (below, below + layout.ep) if n)
        raise ValueError(
            f"--num-experts {experts} must be a multiple of --expert-model-parallel-size "
            f"{layout.ep}; use {legal}"
        )
    if topk is not None and not 1 <= topk <= experts:
        raise ValueError(f"--moe-router-topk {topk} must be between 1 and --num-experts {experts}")
    if layout.tp > 1 and not flags.sequence_parallel:
        raise ValueError(
            f"--num-experts {experts} with --tensor-model-parallel-size {layout.tp} needs "
            "--sequence-parallel, else each rank of the group would route the same tokens"
        )
    if layout.ep > 1 and flags.use_cpu_initialization and flags.moe_layer_impl == "megatron":
        raise ValueError(
            "--use-cpu-initialization gives each expert-parallel rank the same experts in "
            "Megatron's layer; leave it out, or leave out --moe-layer-impl megatron"
        )


def check_layout(flags: argparse.Namespace, world_size: int) -> None:
    """Refuse a number of processes that the parallel sizes do not divide.

    Raises:
        ValueError: Names the sizes and the legal numbers.
    """
    layout = layout_of(flags)
    if sizes := [name for name, size in vars(layout).items() if size < 1]:
        raise ValueError(f"the {sizes[0].upper()} size must be at least 1")
    if world_size % layout.processes:
        hint = ""
        smaller = Layout(layout.tp, layout.pp, layout.cp, layout.ep, 1)
        if layout.ep > 1 and not flags.expert_tensor_parallel_size and layout.tp > 1:
            hint = (
                f" (ETP defaults to TP; --expert-tensor-parallel-size 1 makes it "
                f"{smaller.processes})"
            )
        raise ValueError(
            f"{world_size} processes do not fit {layout}: their number must be a multiple of "
            f"{layout.processes}{hint}"
        )
    replicas = world_size // (layout.tp * layout.pp * layout.cp)
    micro, whole = flags.micro_batch_size, flags.global_batch_size
    if micro and whole and whole % (micro * replicas):
        raise ValueError(
            f"--global-batch-size {whole} must be a multiple of --micro-batch-size {micro} x "
            f"{replicas} data-parallel replicas = {micro * replicas}"
        )
    heads = flags.num_attention_heads
    if heads and heads % layout.tp:
        raise ValueError(
            f"--num-attention-heads {heads} must be a multiple of "
            f"--tensor-model-parallel-size {layout.tp}"
        )


def check_files(flags: argparse.Namespace) -> None:
    """Refuse data and tokenizer files that are not there.

    Raises:
        ValueError: Names the flag and the missing file.
    """
    for flag in _DATA:
        for prefix in getattr(flags, _dest(flag)):
            _check_data(flag, prefix)
    single = list(_FILES)
    if flags.tokenizer_type in _TOKENIZERS_FROM_FILE or _is_path(flags.tokenizer_model):
        single.append("--tokenizer-model")
    for flag in single:
        value = getattr(flags, _dest(flag))
        if value and not Path(value).expanduser().exists():
            raise ValueError(f"{flag} {value}: no such file")


def check_megatron(script: Path) -> None:
    """Refuse a Megatron that the plugin was not read against.

    Raises:
        ValueError: None is installed, or its version is out of range.
    """
    version, where = megatron_version(script)
    if version is None:
        raise ValueError("Megatron-Core is not installed; pip install 'megatron-core[training]'")
    if not SpecifierSet(MEGATRON_VERSIONS).contains(version, prereleases=True):
        raise ValueError(
            f"Megatron-Core {version} ({where}) is outside {MEGATRON_VERSIONS}, which this version "
            "of megatron-moe was made for; install another, or a megatron-moe made for it"
        )


def megatron_version(script: Path) -> tuple[str | None, str]:
    """Return the version of Megatron that ``script`` would import, and where it was found."""
    info = script.resolve().parent / "megatron" / "core" / "package_info.py"
    if info.is_file():
        names = {
            node.targets[0].id: node.value.value
            for node in ast.parse(info.read_text()).body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        }
        parts = (names.get(part) for part in ("MAJOR", "MINOR", "PATCH"))
        return ".".join(map(str, parts)) + str(names.get("PRE_RELEASE", "")), str(info.parent)
    try:
        return importlib.metadata.version("megatron-core"), "installed"
    except importlib.metadata.PackageNotFoundError:
        return None, ""


def _check_data(flag: str, prefix: str) -> None:
    if _is_number(prefix) or "://" in prefix:  # a weight in a blend, or an object store
        return
    if missing := [end for end in (".bin", ".idx") if not Path(prefix + end).is_file()]:
        raise ValueError(
            f"{flag} {prefix}: {prefix}{missing[0]} does not exist; give the path without .bin, "
            "or make the files with megatron-moe data"
        )


def _dest(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_path(text: str | None) -> bool:
    return text is not None and text.startswith(("/", ".", "~"))  # else it may be a name on a hub
