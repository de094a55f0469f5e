"""The launcher: a user's fault in one sentence, and a script that starts as it should."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_moe import run as worker
from megatron_moe.config import MoEConfigError
from megatron_moe.mcore.patching import PatchError

RUN = [sys.executable, "-m", "megatron_moe.cli", "run"]
TP2PP2EP2 = (
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
    "--expert-model-parallel-size 2 --num-experts 4 --sequence-parallel"
)


def launch(*words, limit=60, **environment):
    command = [*RUN, *map(str, words)]
    env = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=limit, env=env)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("raise SystemExit('the script was started')\n")
    return path


BAD = {
    "experts": (
        "--device cpu -n 2",
        "--num-experts 7 --expert-model-parallel-size 2",
        "megatron-moe: --num-experts 7 must be a multiple of --expert-model-parallel-size 2; use "
        "6 or 8",
    ),
    "top-k": (
        "--device cpu",
        "--num-experts 4 --moe-router-topk 8",
        "megatron-moe: --moe-router-topk 8 must be between 1 and --num-experts 4",
    ),
    "data": (
        "--device cpu",
        "--data-path nowhere/text",
        "megatron-moe: --data-path nowhere/text: nowhere/text.bin does not exist; give the path "
        "without .bin, or make the files with megatron-moe data",
    ),
    "NPROC": (
        "--device cpu -n 3",
        TP2PP2EP2,
        "megatron-moe: 3 processes do not fit TP 2, PP 2, CP 1, EP 2, ETP 2: their number must be "
        "a multiple of 8 (ETP defaults to TP; --expert-tensor-parallel-size 1 makes it 4)",
    ),
    "processes of all nodes": (
        "--device cpu -n 2 --nnodes 3",
        "--tensor-model-parallel-size 4",
        "megatron-moe: 6 processes do not fit TP 4, PP 1, CP 1, EP 1, ETP 4: their number must be "
        "a multiple of 4",
    ),
    "no sequence parallelism": (
        "--device cpu -n 2",
        "--tensor-model-parallel-size 2 --num-experts 4",
        "megatron-moe: --num-experts 4 with --tensor-model-parallel-size 2 needs "
        "--sequence-parallel, else each rank of the group would route the same tokens",
    ),
    "no GPU": (
        "--device cuda",
        "",
        "megatron-moe: --device cuda was asked for, but torch finds no CUDA device; use --device "
        "cpu",
    ),
}


@pytest.mark.parametrize(("options", "arguments", "sentence"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(script, options, arguments, sentence):
    start = time.monotonic()
    done = launch(*options.split(), script, *arguments.split(), CUDA_VISIBLE_DEVICES="")
    assert done.stderr == sentence + "\n"
    assert done.stdout == ""
    assert done.returncode == 2
    assert time.monotonic() - start < 15


def test_faults_are_found_before_torch_looks_for_a_gpu(script):
    code = (
        "import sys\n"
        "from megatron_moe.cli import main\n"
        "try:\n"
        f"    main(['run', {str(script)!r}, '--num-experts', '2', '--moe-router-topk', '3'])\n"
        "except SystemExit as ended:\n"
        "    print(ended.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "2 False\n"
    assert done.stderr == (
        "megatron-moe: --moe-router-topk 3 must be between 1 and --num-experts 2\n"
    )


def test_megatron_out_of_range_is_one_sentence(script):
    core = script.parent / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 18\nPATCH = 0\nPRE_RELEASE = ''\n")
    done = launch("--device", "cpu", script)
    assert done.stderr == (
        f"megatron-moe: Megatron-Core 0.18.0 ({core}) is outside >=0.19,<0.20, which this version "
        "of megatron-moe was made for; install another, or a megatron-moe made for it\n"
    )
    assert done.returncode == 2


def test_the_worker_finds_the_same_faults_under_another_launcher(script):
    """Under torchrun or Slurm nobody looked before; the first rank alone says it."""
    command = [sys.executable, "-m", "megatron_moe.run", "--device", "cpu", str(script)]
    command += ["--num-experts", "7", "--expert-model-parallel-size", "2"]
    said = {}
    for rank in ("0", "1"):
        env = os.environ | {"RANK": rank, "WORLD_SIZE": "2"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        said[rank] = done.stderr
        assert done.returncode == 2
    assert said == {"0": BAD["experts"][2] + "\n", "1": ""}


def test_tasks_of_slurm_that_know_nothing_of_each_other(script, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(SystemExit) as ended:
        worker.main(["--device", "cpu", str(script)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(
        "megatron-moe: srun started 8 tasks without RANK and WORLD_SIZE, so that each would train "
        "alone; start one `megatron-moe run` a node, or export RANK, "
    )


@pytest.mark.parametrize("words", [[], ["--help"], ["run", "--help"], ["patches", "--help"]])
def test_help_imports_neither_torch_nor_megatron(words):
    code = (
        "import sys\n"
        "from megatron_moe.cli import main\n"
        f"main({words or ['--help']}, standalone_mode=False)\n"
        "assert not {'torch', 'megatron'} & set(sys.modules), 'slow imports'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


@pytest.fixture
def in_place(monkeypatch):
    """Run a worker's main in this process, without Megatron; returns the devices activated for."""
    activated = []

    @contextlib.contextmanager
    def activate(device):
        activated.append(device)
        yield

    monkeypatch.setattr(worker, "activate", activate)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    return activated


def test_script_starts_as_python_would_start_it(in_place, script, capsys):
    script.write_text(
        "import json, sys\n"
        "print(json.dumps([__name__, sys.argv, sys.path[0], __file__]))\n"
        "if __name__ == '__main__':\n"
        "    import beside\n"
    )
    (script.parent / "beside.py").write_text("print('imported')\n")
    worker.main(["--device", "cpu", str(script), "--bf16", "--device", "theirs"])
    out, err = capsys.readouterr()
    assert in_place == ["cpu"]
    assert json.loads(out.splitlines()[0]) == [
        "__main__",
        [str(script), "--bf16", "--device", "theirs"],
        str(script.parent),
        str(script),
    ]
    assert out.splitlines()[1] == "imported"
    assert err.startswith("megatron-moe: set for the CPU: --distributed-backend gloo ")
    assert err.count("\n") == 1


def test_flags_that_were_typed_are_not_echoed(in_place, script, capsys, monkeypatch):
    script.write_text("")
    worker.main(["--device", "cpu", str(script), "--no-rope-fusion"])
    assert "--no-rope-fusion" not in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    worker.main(["--device", "cpu", str(script)])
    assert capsys.readouterr().err == ""


def test_device_from_the_environment(in_place, script, capsys, monkeypatch):
    script.write_text("")
    monkeypatch.setenv("MEGATRON_MOE_DEVICE", "cpu")
    worker.main([str(script)])
    assert in_place == ["cpu"]


@pytest.mark.parametrize(
    ("asked", "driver", "torch_finds", "device"),
    [
        ("auto", True, True, "cuda"),
        ("cuda", True, True, "cuda"),
        ("auto", True, False, "cpu"),
        ("auto", False, None, "cpu"),
        ("cpu", None, None, "cpu"),
        ("cuda", True, False, None),
    ],
)
def test_device(monkeypatch, asked, driver, torch_finds, device):
    """None: must not be asked, or refused."""

    def answer(value):
        assert value is not None
        return value

    monkeypatch.setattr(worker, "_driver_found", lambda: answer(driver))
    monkeypatch.setattr(worker, "_torch_finds_cuda", lambda: answer(torch_finds))
    if device is None:
        with pytest.raises(ValueError, match="--device cuda was asked for, but torch finds no"):
            worker.resolve_device(asked)
    else:
        assert worker.resolve_device(asked) == device


@pytest.mark.parametrize(
    "fault", [MoEConfigError("first option\nsecond option"), PatchError("f: read it again")]
)
def test_refusals_during_the_run_have_no_traceback(in_place, script, capsys, monkeypatch, fault):
    def refuse(device):
        raise fault

    monkeypatch.setattr(worker, "activate", refuse)
    with pytest.raises(SystemExit) as ended:
        worker.main(["--device", "cpu", str(script)])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()[1:]
    assert lines == [f"megatron-moe: {line}" for line in str(fault).splitlines()]


TWO_RANKS = """
import json, os, sys, time
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.ones(1, device="cuda")
dist.all_reduce(total)
print(json.dumps({
    "rank": dist.get_rank(),
    "total": total.item(),
    "argv": sys.argv[1:],
    "cuda": torch.cuda.is_available(),
    "device": str(torch.cuda.current_device()),
    "environment": [os.environ[n] for n in ("OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS")],
}), flush=True)
if sys.argv[-1] == "fail" and dist.get_rank() == 1:
    sys.exit(7)
if sys.argv[-1] == "fail":
    time.sleep(60)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("ending", [pytest.param("succeed", marks=pytest.mark.slow), "fail"])
def test_two_processes_through_the_elastic_launcher(script, ending):
    script.write_text(TWO_RANKS)
    words = [script, "--expert-model-parallel-size", "2", "--num-experts", "4", ending]
    done = launch("--device", "cpu", *words, limit=240)
    # Two processes share the pipe: one's line may follow the other's before its line end.
    lines = done.stdout.replace("}{", "}\n{").splitlines()
    ranks = sorted(
        (json.loads(line) for line in lines if line.startswith("{")),
        key=lambda found: found["rank"],
    )
    assert [found["rank"] for found in ranks] == [0, 1], done.stderr
    for found in ranks:
        assert found["total"] == 2.0
        assert found["argv"][-1] == ending
        assert found["cuda"] is False
        assert found["device"] == "cpu"
        assert found["environment"] == ["1", "1"]
    lines = done.stderr.splitlines()
    assert lines[0] == "megatron-moe: 2 processes for TP 1, PP 1, CP 1, EP 2, ETP 1"
    assert lines[1].startswith("megatron-moe: set for the CPU: ")
    if ending == "fail":
        assert done.returncode == 7
        assert lines[2:] == ["megatron-moe: rank 1 failed: exit code 7"]
    else:
        assert done.returncode == 0
        assert lines[2:] == []


@pytest.mark.slow
def test_ctrl_c_ends_all_processes(script):
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(300)\n")
    command = [*RUN, "--device", "cpu", "-n", "1", str(script)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert started.stdout is not None
    pid = int(started.stdout.readline())
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 130
    assert said.splitlines()[-1] == "megatron-moe: stopped by SIGINT"
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.upstream_script
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_unmodified_upstream_script_in_four_dimensions(tmp_path):
    """TP 2, PP 2, EP 2, ETP 1 with sequence parallelism: trains, saves, resumes and goes on."""
    checkout = os.environ.get("MEGATRON_LM")
    if not checkout:
        pytest.skip("set MEGATRON_LM to a checkout of Megatron-LM at core_v0.19.0")
    line = (
        "--mock-data --tokenizer-type NullTokenizer --vocab-size 128 --num-layers 2 "
        "--hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
        "--micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --lr-decay-iters 20 "
        "--log-interval 1 --eval-interval 100 --eval-iters 1 --disable-bias-linear "
        f"--moe-router-topk 2 --moe-token-dispatcher-type alltoall {TP2PP2EP2} "
        "--expert-tensor-parallel-size 1 "
        f"--use-distributed-optimizer --override-opt-param-scheduler --save {tmp_path} "
        "--save-interval 3 --ckpt-format torch_dist"
    ).split()
    where = ["--device", "cpu", "-n", "4", Path(checkout) / "pretrain_gpt.py"]
    first = launch(*where, *line, "--train-iters", "3", limit=400)
    assert first.returncode == 0, first.stderr[-3000:]
    losses = _losses(first.stdout)
    second = launch(*where, *line, "--train-iters", "6", "--load", tmp_path, limit=400)
    assert second.returncode == 0, second.stderr[-3000:]
    losses |= _losses(second.stdout)
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[6] < losses[4] < losses[1]


def _losses(output):
    # Other ranks' words may stand in the same line, before or behind.
    found = re.findall(r"iteration +(\d+)/.*? lm loss: ([\d.E+-]+)", output)
    return {int(iteration): float(loss) for iteration, loss in found}
