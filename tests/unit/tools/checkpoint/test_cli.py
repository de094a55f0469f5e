"""The commands: what they print, how they fail, what they import."""

import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from helpers.spoiling import edit_atom
from helpers.synthetic import made

from megatron_moe.cli import main
from megatron_moe.tools.checkpoint.model.atoms import AtomId
from megatron_moe.tools.checkpoint.write import execute

TO_TORCH = ["--format", "torch", "--tp", "2", "--ep", "1", "--dp", "1", "--workers", "1"]


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wishes = {"form": "torch_dist", "tp": 1, "ep": 2, "etp": 1, "dp": 2, "optim": "fully"}
    return made(tmp_path_factory.mktemp("source") / "save", **wishes)


def call(*line: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in line])


def refused(*line: object) -> str:
    """Return the one line that a command fails with."""
    result = call(*line)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    (said,) = result.stderr.splitlines()
    assert said.startswith(f"megatron-moe {line[0]}: ")
    return said.removeprefix(f"megatron-moe {line[0]}: ")


def test_inspect(save: Path) -> None:
    lines = call("inspect", save).output.splitlines()
    facts = {line[:22].strip(): line[22:].strip() for line in lines}
    assert facts["layout"] == "TP1·PP1·EP2·DP2"
    assert facts["experts per rank"] == "2"
    assert facts["bytes"].startswith("weight ")


def test_inspect_as_json_with_atoms(save: Path) -> None:
    said = json.loads(call("inspect", save, "--json", "--atoms").output)
    assert said["optimizer"] == "fully_reshardable"
    assert said["warnings"] == []
    router = "decoder.layers.0.mlp.router.weight"
    assert said["atoms"][router] == ["bfloat16", [4, 8]]
    assert said["atoms"][f"{router} [exp_avg]"] == ["float32", [4, 8]]
    assert "atoms" not in json.loads(call("inspect", save, "--json").output)


def test_an_iteration_by_its_folder_or_number(save: Path) -> None:
    whole = call("inspect", save).output
    assert call("inspect", save / "iter_0000007").output == whole
    assert call("inspect", save, "--iteration", 7).output == whole
    said = refused("inspect", save, "--iteration", 8)
    assert "--iteration asks for iter_0000008, which does not exist" in said


@pytest.mark.parametrize("command", ["inspect", "verify", "reshard"])
def test_what_is_no_checkpoint_is_one_line(command: str, tmp_path: Path) -> None:
    out = [tmp_path / "out"] if command == "reshard" else []
    said = refused(command, tmp_path / "nowhere", *out)
    assert said == f"{tmp_path}/nowhere: no such folder; give the folder passed to --save"


def test_a_file_that_cannot_be_read_is_one_line(
    save: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/save/.metadata")

    name = "megatron_moe.tools.checkpoint.read.open.open_checkpoint"
    monkeypatch.setattr(name, unreadable)
    assert refused("inspect", save) == "[Errno 13] Permission denied: '/save/.metadata'"


def test_reshard_and_verify(save: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call("reshard", save, out, *TO_TORCH)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "from torch_dist TP1·PP1·EP2·DP2 (fully_reshardable)"
    assert lines[1].startswith("to   torch TP2·PP1·EP1")
    assert lines[-1] == f"written: {out}/iter_0000007"
    result = call("verify", save, out)
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "equal")
    result = call("verify", out)
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "whole")
    result = call("verify", save, out, "--fast", "--json")
    assert (result.exit_code, json.loads(result.output)["faults"]) == (0, [])


def test_verify_names_what_is_wrong(save: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("reshard", save, out, *TO_TORCH).exit_code == 0

    def flip(box) -> None:
        box[0] ^= 1 << 3

    name = "decoder.final_layernorm.weight"
    file = edit_atom(out, AtomId(name), flip, crc=False)
    result = call("verify", out)
    assert result.exit_code == 1
    assert (
        f"WRONG {file}: {name}: its bytes do not match their CRC: they have changed since it was "
        "written"
    ) in result.output.splitlines()
    said = json.loads(call("verify", out, "--json").output)["faults"]
    assert {"file": file, "tensor": name} == {k: said[0][k] for k in ("file", "tensor")}
    different = call("verify", save, out)
    assert different.exit_code == 1
    assert f"{out}/iter_0000007: {name}: differs in 1 of 8 elements, first at [0]" in (
        different.output
    )


def test_a_dry_run_writes_nothing(save: Path, tmp_path: Path) -> None:
    result = call("reshard", save, tmp_path / "out", *TO_TORCH, "--dry-run")
    assert result.exit_code == 0
    assert result.output.startswith("from torch_dist ")
    plan = json.loads(
        call("reshard", save, tmp_path / "out", *TO_TORCH, "--dry-run", "--json").output
    )
    assert plan["to"]["format"] == "torch"
    assert {f["path"] for f in plan["files"]} >= {"mp_rank_00/model_optim_rng.pt"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (["--ep", "3"], "--ep 3: 4 experts do not divide over 3 ranks; choose a divisor"),
        (["--tp", "3", "--etp", "1"], "--tp 3: dimension 1 of self_attention.linear_proj.weight (8)"
                                      " does not divide by it; choose a divisor"),
        (["--vpp", "2"], "--vpp 2 with --pp 1: virtual stages divide the layers of pipeline stages;"
                         " pass --pp 2 or more, or leave --vpp out"),
        (["--tp", "0"], "--tp 0: a parallel size is at least 1"),
        (["--format", "torch", "--etp", "2", "--dp", "4"],
         "--format torch --etp 2 --tp 1: torch file names have no ETP, so with ETP > TP ranks "
         "would share files: pass --format torch_dist"),
        (["--dp", "3"], "--tp 1 --dp 3: a stage's 3 ranks are not a multiple of EP·ETP = 2·1 = 2; "
                        "pass a --dp that makes TP·DP one"),
        (["--pp", "3"], "2 layers over PP 3 · VPP 1: 2 layers do not divide over 3 stages; pass "
                        "--decoder-first-pipeline-num-layers / --decoder-last-pipeline-num-layers, "
                        "or --pipeline-layout"),
        (["--pipeline-layout", "EtL"],
         "--pipeline-layout 'EtL' holds 1 decoder and 0 MTP layers, the checkpoint 2 and 0: make "
         "them equal"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_layout_that_cannot_be(save: Path, tmp_path: Path, wish: list[str], said: str) -> None:
    assert refused("reshard", save, tmp_path / "out", *wish) == said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"), [("512M", 512 << 20), ("2G", 2 << 30), ("1.5GiB", 3 << 29), ("64kb", 1 << 16),
                       ("100", 100)],
)  # fmt: skip
def test_sizes(
    save: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, size: int
) -> None:
    given = []

    def noted(plan: object, out: Path, options: execute.Options) -> Path:
        given.append(options)
        return out

    monkeypatch.setattr(execute, "execute", noted)
    assert call("reshard", save, tmp_path / "out", "--max-ram", text).exit_code == 0
    assert [options.max_ram for options in given] == [size]


def test_what_is_no_size(save: Path, tmp_path: Path) -> None:
    result = call("reshard", save, tmp_path / "out", "--max-ram", "much")
    assert result.exit_code == 2
    assert "'much' is no size; say 512M or 2G" in result.stderr


class Act:
    """A pickle that runs a command when it is loaded for real."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def malicious(save: Path, tmp_path: Path) -> Path:
    out = tmp_path / "evil"
    assert call("reshard", save, out, *TO_TORCH).exit_code == 0
    path = out / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    torch.save(state | {"extra": Act(tmp_path / "ran")}, path)
    return out


def test_a_pickle_that_would_act_is_refused_by_name(malicious: Path, tmp_path: Path) -> None:
    path = malicious / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    name = f"{pickle.whichmodule(os.system, 'system')}.system"
    for line in (["inspect"], ["verify"], ["reshard"]):
        out = [tmp_path / "out"] if line == ["reshard"] else []
        said = refused(*line, malicious, *out)
        assert str(path) in said and name in said
    assert not (tmp_path / "ran").exists()


def test_a_trusted_name_passes_and_is_not_run(malicious: Path, tmp_path: Path) -> None:
    name = f"{pickle.whichmodule(os.system, 'system')}.system"
    result = call("inspect", malicious, "--trust", name)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "ran").exists()


_WATCHED = """
import sys
from megatron_moe.cli import main
try:
    main(sys.argv[1:], standalone_mode=False)
except SystemExit as end:
    assert not end.code
heavy = {"torch", "megatron", "transformer_engine"} & set(sys.modules)
print("imported:", sorted(heavy), file=sys.stderr)
"""


def started(*line: object, program: str = _WATCHED) -> tuple[str, float]:
    """Run a command in an interpreter of its own; return what it said last, and CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-c", program, *map(str, line)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (done.stderr or done.stdout).splitlines()[-1], spent


def test_neither_torch_nor_megatron_is_imported(save: Path, tmp_path: Path) -> None:
    assert started("inspect", save)[0] == "imported: []"
    assert started("reshard", save, tmp_path / "out", *TO_TORCH)[0] == "imported: []"
    assert started("verify", save, tmp_path / "out")[0] == "imported: []"


def test_help_is_there_at_once() -> None:
    program = "from megatron_moe.cli import main; main()"
    said, seconds = min(
        (started("inspect", "--help", program=program) for _ in range(3)), key=lambda run: run[1]
    )
    assert said.strip().startswith("-h, --help")
    assert seconds < 1.0
