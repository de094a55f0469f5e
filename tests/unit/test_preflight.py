"""A user's fault is named in one sentence, from the command line alone."""

import importlib.metadata
import re

import pytest

from megatron_moe import preflight
from megatron_moe.cpu_flags import CPU_FLAGS, check_cpu_flags, flags_to_set, typed_flags
from megatron_moe.preflight import check_run, layout_of, read_flags


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "pretrain.py"
    path.write_text("print('trained')\n")
    return path


def fault(script, line, world_size=1, device="cpu"):
    """Return the one sentence with which ``line`` is refused."""
    with pytest.raises(ValueError) as refused:
        check_run(script, line.split(), device, world_size)
    assert "\n" not in str(refused.value)
    return str(refused.value)


MOE = "--num-experts 8 --moe-router-topk 2"

REFUSED = {
    "experts not divisible": (
        "--num-experts 7 --expert-model-parallel-size 2",
        2,
        "--num-experts 7 must be a multiple of --expert-model-parallel-size 2; use 6 or 8",
    ),
    "fewer experts than EP": (
        "--num-experts 3 --expert-model-parallel-size=4",
        4,
        "--num-experts 3 must be a multiple of --expert-model-parallel-size 4; use 4",
    ),
    "top-k": (
        "--num-experts=4 --moe-router-topk=5",
        1,
        "--moe-router-topk 5 must be between 1 and --num-experts 4",
    ),
    "EP without experts": (
        "--expert-model-parallel-size 2",
        2,
        "--expert-model-parallel-size 2 needs --num-experts, a multiple of 2",
    ),
    "TP without SP": (
        f"{MOE} --tensor-model-parallel-size 2",
        2,
        "--num-experts 8 with --tensor-model-parallel-size 2 needs --sequence-parallel, else each "
        "rank of the group would route the same tokens",
    ),
    "NPROC": (
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
        6,
        "6 processes do not fit TP 2, PP 2, CP 1, EP 1, ETP 2: their number must be a multiple "
        "of 4",
    ),
    "NPROC, and ETP follows TP": (
        f"{MOE} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--expert-model-parallel-size 2 --sequence-parallel",
        4,
        "4 processes do not fit TP 2, PP 2, CP 1, EP 2, ETP 2: their number must be a multiple "
        "of 8 (ETP defaults to TP; --expert-tensor-parallel-size 1 makes it 4)",
    ),
    "equal experts": (
        f"{MOE} --expert-model-parallel-size 2 --use-cpu-initialization --moe-layer-impl megatron",
        2,
        "--use-cpu-initialization gives each expert-parallel rank the same experts in Megatron's "
        "layer; leave it out, or leave out --moe-layer-impl megatron",
    ),
    "size of an axis": (
        "--tensor-model-parallel-size -1",
        1,
        "the TP size must be at least 1",
    ),
    "batch": (
        "--micro-batch-size 2 --global-batch-size 6",
        2,
        "--global-batch-size 6 must be a multiple of --micro-batch-size 2 x 2 data-parallel "
        "replicas = 4",
    ),
    "heads": (
        "--num-attention-heads 3 --tensor-model-parallel-size 2",
        2,
        "--num-attention-heads 3 must be a multiple of --tensor-model-parallel-size 2",
    ),
    "not a number": ("--num-experts many", 1, "--num-experts: invalid int value: 'many'"),
    "value missing": ("--num-experts", 1, "--num-experts: expected one argument"),
    "no tokenizer file": (
        "--tokenizer-type SentencePieceTokenizer --tokenizer-model nowhere.model",
        1,
        "--tokenizer-model nowhere.model: no such file",
    ),
    "no tokenizer folder": (
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model ./nowhere",
        1,
        "--tokenizer-model ./nowhere: no such file",
    ),
    "no vocabulary": ("--vocab-file v.json", 1, "--vocab-file v.json: no such file"),
    "fp8": (
        "--fp8-format hybrid",
        1,
        "--fp8-format hybrid cannot work on --device cpu: the low-precision matmuls exist on GPUs "
        "only; use --bf16, with --moe-fp8-emulate for what FP8 does to the loss",
    ),
    "graphs": (
        "--cuda-graph-impl=local",
        1,
        "--cuda-graph-impl local cannot work on --device cpu: there are no CUDA graphs on a CPU",
    ),
    "flex": (
        f"{MOE} --moe-token-dispatcher-type flex",
        1,
        "--moe-token-dispatcher-type flex cannot work on --device cpu: DeepEP, HybridEP and "
        "NCCL-EP are GPU libraries; use alltoall or allgather",
    ),
    "writer of its own": (
        "--async-save",
        1,
        "--async-save cannot work on --device cpu: its writer is a process of its own, which looks "
        "for a GPU; leave it out",
    ),
    "context parallelism": (
        "--context-parallel-size 2",
        2,
        "--context-parallel-size 2 cannot work on --device cpu: Megatron's attention splits the "
        "sequence through Transformer Engine only; use --tensor-model-parallel-size with "
        "--sequence-parallel",
    ),
    "nccl": (
        "--distributed-backend nccl",
        1,
        "--distributed-backend nccl cannot work on --device cpu: NCCL moves data of GPUs only",
    ),
    "a flag without a value": (
        "--moe-permute-fusion --bf16",
        1,
        "--moe-permute-fusion cannot work on --device cpu: it needs Transformer Engine's kernels",
    ),
}


@pytest.mark.parametrize(("line", "world_size", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused(script, line, world_size, sentence):
    assert fault(script, line, world_size) == sentence


@pytest.mark.parametrize(
    ("line", "world_size"),
    [
        ("", 3),
        (f"{MOE} --expert-model-parallel-size 4", 4),
        (f"{MOE} --tensor-model-parallel-size 2 --sequence-parallel", 2),
        (
            f"{MOE} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
            "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1 --sequence-parallel",
            4,
        ),
        ("--attention-backend unfused --transformer-impl local --cuda-graph-impl none", 1),
        ("--tokenizer-type HuggingFaceTokenizer --tokenizer-model gpt2", 1),
        ("--data-path s3://bucket/prefix --flag-of-the-script 3", 1),
        ("--expert-model-parallel-size 2 --use-checkpoint-args", 2),
    ],
)
def test_accepted(script, line, world_size):
    check_run(script, line.split(), "cpu", world_size)


def test_what_a_cpu_cannot_do_is_no_fault_on_a_gpu(script):
    check_run(script, ["--fp8-format", "hybrid", "--transformer-impl", "local"], "cuda", 1)


def test_missing_data_names_the_file(script, tmp_path):
    (tmp_path / "text.bin").touch()
    prefix = tmp_path / "text"
    assert fault(script, f"--data-path 0.3 {prefix}") == (
        f"--data-path {prefix}: {prefix}.idx does not exist; give the path without .bin, or make "
        "the files with megatron-moe data"
    )
    (tmp_path / "text.idx").touch()
    check_run(script, ["--data-path", "0.3", str(prefix)], "cpu", 1)


def test_missing_script(tmp_path):
    assert fault(tmp_path / "no.py", "").endswith(
        "no.py does not exist; give the path of the training script"
    )


def test_megatron_out_of_range(script, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.1")
    assert re.fullmatch(
        r"Megatron-Core 0\.20\.1 \(installed\) is outside >=0\.19,<0\.20, which .*",
        fault(script, ""),
    )


def test_megatron_missing(script, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert fault(script, "") == (
        "Megatron-Core is not installed; pip install 'megatron-core[training]'"
    )


@pytest.mark.parametrize(
    ("release", "fits"), [("0, 18, 2", False), ("0, 19, 1", True), ("0, 20, 0", False)]
)
def test_a_checkout_beside_the_script_counts_instead(script, release, fits):
    core = script.parent / "megatron" / "core"
    core.mkdir(parents=True)
    major, minor, micro = release.split(", ")
    (core / "package_info.py").write_text(
        f'MAJOR = {major}\nMINOR = {minor}\nPATCH = {micro}\nPRE_RELEASE = "rc1"\n'
        "VERSION = (MAJOR, MINOR, PATCH, PRE_RELEASE)\n"
    )
    version = release.replace(", ", ".") + "rc1"
    assert preflight.megatron_version(script) == (version, str(core))
    if fits:
        check_run(script, [], "cpu", 1)
    else:
        assert fault(script, "").startswith(f"Megatron-Core {version} ({core}) is outside")


def test_smallest_number_of_processes():
    line = "--tensor-model-parallel-size 2 --expert-model-parallel-size 3 --num-experts 6"
    assert layout_of(read_flags(line.split())).processes == 6
    assert layout_of(read_flags([])).processes == 1


def test_typed_flags_are_read_in_both_spellings():
    assert typed_flags(["--a", "1", "--b=2", "--c", "--d"]) == [
        ("--a", "1"),
        ("--b", "2"),
        ("--c", None),
        ("--d", None),
    ]


def test_only_flags_that_were_not_typed_are_set():
    left = flags_to_set(["--no-rope-fusion", "--transformer-impl=local"])
    assert {flag.flag for flag in CPU_FLAGS} - {flag.flag for flag in left} == {
        "--no-rope-fusion",
        "--transformer-impl",
    }


def test_no_flag_that_is_set_is_refused():
    line = [word for flag in CPU_FLAGS for word in flag.typed.split()]
    check_cpu_flags(line)
    assert flags_to_set(line) == []
