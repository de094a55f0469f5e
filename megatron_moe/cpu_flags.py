"""Which of Megatron's flags a run on the CPU needs, and which it cannot honour."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CpuFlag:
    """A flag that ``--device cpu`` sets, so that nobody has to type it.

    Args:
        flag: As typed.
        dest: Its name among Megatron's parsed arguments.
        value: The value it sets; booleans belong to flags without a value.
        also: Other values that a user may type.
        reason: Why others cannot work.
    """

    flag: str
    dest: str
    value: str | bool
    reason: str = ""
    also: tuple[str, ...] = ()

    @property
    def typed(self) -> str:
        """The flag with its value, as one would type it."""
        return self.flag if isinstance(self.value, bool) else f"{self.flag} {self.value}"


CPU_FLAGS: tuple[CpuFlag, ...] = (
    CpuFlag("--distributed-backend", "distributed_backend", "gloo", "NCCL moves data of GPUs only"),
    CpuFlag(
        "--transformer-impl",
        "transformer_impl",
        "local",
        "Transformer Engine's kernels run on GPUs only",
    ),
    CpuFlag(
        "--attention-backend",
        "attention_backend",
        "unfused",
        "flash and fused attention are kernels for GPUs",
        also=("auto",),
    ),
    CpuFlag("--no-persist-layer-norm", "no_persist_layer_norm", True),
    CpuFlag("--no-masked-softmax-fusion", "masked_softmax_fusion", False),
    CpuFlag("--no-bias-swiglu-fusion", "bias_swiglu_fusion", False),
    CpuFlag("--no-bias-gelu-fusion", "bias_gelu_fusion", False),
    CpuFlag("--no-bias-dropout-fusion", "bias_dropout_fusion", False),
    CpuFlag("--no-gradient-accumulation-fusion", "gradient_accumulation_fusion", False),
    CpuFlag("--no-rope-fusion", "apply_rope_fusion", False),
)

_LOW_PRECISION = (
    "the low-precision matmuls exist on GPUs only; use --bf16, with --moe-fp8-emulate for what FP8 "
    "does to the loss"
)
_GRAPHS = "there are no CUDA graphs on a CPU"
_NCCL = "it belongs to NCCL"
_ENGINE = "it needs Transformer Engine's kernels"
_FSDP = "Megatron's FSDP allocates through CUDA; use --use-distributed-optimizer"
_DEEPEP = "DeepEP, HybridEP and NCCL-EP are GPU libraries; use alltoall or allgather"
_ASYNC = "its writer is a process of its own, which looks for a GPU; leave it out"
_OFFLOAD = "there is no GPU memory to relieve"

REFUSED_FLAGS: dict[str, str] = {
    "--fp8-format": _LOW_PRECISION,
    "--fp8-param-gather": _LOW_PRECISION,
    "--fp8-output-proj": _LOW_PRECISION,
    "--fp4-format": _LOW_PRECISION,
    "--fp4-param-gather": _LOW_PRECISION,
    "--enable-cuda-graph": _GRAPHS,
    "--external-cuda-graph": _GRAPHS,
    "--cuda-graph-scope": _GRAPHS,
    "--cuda-graph-modules": _GRAPHS,
    "--optimizer-cuda-graph": _GRAPHS,
    "--use-flash-attn": "flash attention is a kernel for GPUs",
    "--flash-decode": "flash attention is a kernel for GPUs",
    "--moe-enable-deepep": _DEEPEP,
    "--moe-permute-fusion": _ENGINE,
    "--moe-router-fusion": _ENGINE,
    "--use-te-activation-func": _ENGINE,
    "--te-rng-tracker": _ENGINE,
    "--te-precision-config-file": _ENGINE,
    "--mla-down-proj-fusion": _ENGINE,
    "--delay-wgrad-compute": _ENGINE,
    "--tp-comm-overlap": _ENGINE,
    "--overlap-moe-expert-parallel-comm": "it overlaps streams of a GPU",
    "--use-megatron-fsdp": _FSDP,
    "--use-torch-fsdp2": _FSDP,
    "--use-nccl-ub": _NCCL,
    "--use-sharp": _NCCL,
    "--nccl-communicator-config-path": _NCCL,
    "--optimizer-cpu-offload": _OFFLOAD,
    "--fine-grained-activation-offloading": _OFFLOAD,
    "--cpu-offloading-num-layers": _OFFLOAD,
    "--async-save": _ASYNC,
    "--use-persistent-ckpt-worker": _ASYNC,
    "--gpu-sniff-test-interval": "it measures GPUs",
}

_REFUSED_VALUES: dict[str, tuple[Callable[[str], bool], str]] = {
    "--cuda-graph-impl": (lambda value: value != "none", _GRAPHS),
    "--moe-token-dispatcher-type": (lambda value: value == "flex", _DEEPEP),
    "--cross-entropy-fusion-impl": (lambda value: value == "te", _ENGINE),
    "--dsa-kernel-backend": (lambda value: value != "none", "its kernels are for GPUs"),
    "--pipeline-model-parallel-comm-backend": (lambda value: True, "use gloo, which is set"),
    "--context-parallel-size": (
        lambda value: value != "1",
        "Megatron's attention splits the sequence through Transformer Engine only; use "
        "--tensor-model-parallel-size with --sequence-parallel",
    ),
}


def check_cpu_flags(argv: Sequence[str]) -> None:
    """Refuse what cannot work on a CPU.

    Raises:
        ValueError: A flag contradicts the CPU run; names the flag, the value and the reason.
    """
    for flag, value in typed_flags(argv):
        if reason := _reason_against(flag, value):
            shown = flag if value is None else f"{flag} {value}"
            raise ValueError(f"{shown} cannot work on --device cpu: {reason}")


def flags_to_set(argv: Sequence[str]) -> list[CpuFlag]:
    """Return the CPU flags that the user has not typed."""
    typed = {flag for flag, _ in typed_flags(argv)}
    return [cpu_flag for cpu_flag in CPU_FLAGS if cpu_flag.flag not in typed]


def typed_flags(argv: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return every flag with the value typed after it or after ``=``, or None."""
    found: list[tuple[str, str | None]] = []
    for place, word in enumerate(argv):
        if not word.startswith("--"):
            continue
        flag, equals, value = word.partition("=")
        following = argv[place + 1] if place + 1 < len(argv) else "--"
        found.append((flag, value if equals else None if following.startswith("--") else following))
    return found


def _reason_against(flag: str, value: str | None) -> str | None:
    if flag in REFUSED_FLAGS:
        return REFUSED_FLAGS[flag]
    for cpu_flag in CPU_FLAGS:
        if flag == cpu_flag.flag and isinstance(cpu_flag.value, str):
            return None if value in (cpu_flag.value, *cpu_flag.also) else cpu_flag.reason
    wrong, reason = _REFUSED_VALUES.get(flag, (None, ""))
    return reason if wrong and value is not None and wrong(value) else None
