"""What `verify` finds: every known corruption, by file, tensor and cause."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.spoiling import edit_atom
from helpers.synthetic import Arch, made, reshard

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.model.atoms import AtomId
from megatron_moe.tools.checkpoint.read.open import open_checkpoint
from megatron_moe.tools.checkpoint.read.values import AtomReader
from megatron_moe.tools.checkpoint.verify import Fault, compare, to_bfloat16, verify
from megatron_moe.tools.checkpoint.write import manifest

EP2 = {"tp": 1, "ep": 2, "etp": 1, "dp": 2, "optim": "fully"}
FORMS = ["torch", "torch_dist"]
EXPERT = "decoder.layers.1.mlp.experts.2.linear_fc2.weight"
ROUTER = "decoder.layers.0.mlp.router.weight"
CRC = "its bytes do not match their CRC: they have changed since it was written"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    return {form: made(folder / form, form=form, **EP2) for form in FORMS}


@pytest.fixture
def checkpoint(originals: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(originals[request.param], tmp_path / "save"))


both = pytest.mark.parametrize("checkpoint", FORMS, indirect=True)
legacy = pytest.mark.parametrize("checkpoint", ["torch"], indirect=True)
dist = pytest.mark.parametrize("checkpoint", ["torch_dist"], indirect=True)


def faults(folder: Path) -> list[Fault]:
    return verify(open_checkpoint(folder), workers=1).faults


def without_manifest(folder: Path) -> None:
    (folder / "iter_0000007" / manifest.NAME).unlink()


def flip(values: np.ndarray) -> None:
    values[(0,) * values.ndim] ^= 1 << 3


@both
def test_a_whole_checkpoint(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    verdict = verify(opened, workers=1)
    assert verdict.faults == [] and verdict.warnings == []
    atoms = opened.tensors.atoms
    assert verdict.checked == {
        "records by CRC": len(opened.tensors.records),
        "replicas": sum(len(held.replicas) for held in atoms.values()),
        "masters": sum(atom.role == "master" for atom in atoms),
        "atoms": len(atoms),
    }
    assert verdict.digests == manifest.digests_of(opened)


@both
@pytest.mark.parametrize("role", ["weight", "master", "exp_avg", "exp_avg_sq"])
def test_one_flipped_bit(checkpoint: Path, role: str) -> None:
    atom = AtomId(EXPERT, role)
    file = edit_atom(checkpoint, atom, flip, crc=False)
    opened = open_checkpoint(checkpoint)
    label = opened.tensors.records[opened.tensors.atoms[atom].extents[0].record].label
    found = faults(checkpoint)
    assert found[0] == Fault(file, label, CRC)
    different = Fault(manifest.NAME, str(atom), "is not what was written: its checksum differs")
    assert different in found
    assert not any("PR 5077" in fault.cause for fault in found)


@both
def test_a_changed_tensor_with_a_right_crc_is_found_by_its_manifest(checkpoint: Path) -> None:
    edit_atom(checkpoint, AtomId(EXPERT, "exp_avg"), flip)
    assert faults(checkpoint) == [
        Fault(manifest.NAME, f"{EXPERT} [exp_avg]", "is not what was written: its checksum differs")
    ]


@legacy
def test_a_truncated_torch_file(checkpoint: Path) -> None:
    path = checkpoint / "iter_0000007" / "mp_rank_00_001" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=str(path)):
        open_checkpoint(checkpoint)


@dist
def test_a_truncated_torch_dist_file(checkpoint: Path) -> None:
    path = checkpoint / "iter_0000007" / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{path}: truncated: \d+ bytes, .metadata places"):
        open_checkpoint(checkpoint)


@legacy
def test_a_missing_torch_file(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "iter_0000007" / "mp_rank_00_001")
    with pytest.raises(CheckpointError, match="no mp_rank file holds pp 0, ep 1, etp 0"):
        open_checkpoint(checkpoint)


@dist
def test_a_missing_torch_dist_file(checkpoint: Path) -> None:
    path = checkpoint / "iter_0000007" / "__1_0.distcp"
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path}: missing; .metadata places \S+ in it"):
        open_checkpoint(checkpoint)


@legacy
@pytest.mark.parametrize("local", [0, 1])
def test_an_expert_missing_in_torch(checkpoint: Path, local: int) -> None:
    path = checkpoint / "iter_0000007" / "mp_rank_00_001" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    for name in [n for n in state["model"] if f".0.mlp.experts.local_experts.{local}." in n]:
        del state["model"][name]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=rf"of experts \[{2 + local}\] is missing"):
        open_checkpoint(checkpoint, optimizer=False)


@dist
def test_an_expert_missing_in_torch_dist(checkpoint: Path) -> None:
    path = checkpoint / "iter_0000007" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    key = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    chunks = metadata.state_dict_metadata[key].chunks
    lost = next(chunk for chunk in chunks if tuple(chunk.offsets)[:2] == (1, 3))
    chunks.remove(lost)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=rf"{key}: 64 of 512 elements are in no part"):
        open_checkpoint(checkpoint)


def values_of(folder: Path, atom: AtomId) -> np.ndarray:
    opened = open_checkpoint(folder)
    with AtomReader(opened) as reader:
        return np.concatenate(list(reader.blocks(opened.tensors.atoms[atom])))


def overwrite(folder: Path, atom: AtomId, values: np.ndarray) -> str:
    def edit(box: np.ndarray) -> None:
        box[...] = values

    return edit_atom(folder, atom, edit)


@both
def test_an_expert_written_twice(checkpoint: Path) -> None:
    """All of expert 2 in expert 3's place, as when a rank writes where another should."""
    without_manifest(checkpoint)
    names = ["linear_fc1.weight.gate", "linear_fc1.weight.up", "linear_fc2.weight"]
    file = ""
    for name in names:
        for role in ("weight", "master", "exp_avg", "exp_avg_sq"):
            mine, twin = (AtomId(f"decoder.layers.1.mlp.experts.{n}.{name}", role) for n in (2, 3))
            written = overwrite(checkpoint, twin, values_of(checkpoint, mine))
            file = written if role == "weight" else file
    cause = "equals expert 2: written twice, or both were never trained"
    assert sorted(faults(checkpoint)) == [
        Fault(file, f"decoder.layers.1.mlp.experts.3.{name}", cause) for name in names
    ]


@legacy
def test_replicas_that_differ(checkpoint: Path) -> None:
    """Dense tensors lie in the file of every expert-parallel rank."""
    without_manifest(checkpoint)
    file = edit_atom(checkpoint, AtomId(ROUTER), flip, extent=1)
    assert file == "mp_rank_00_001/model_optim_rng.pt"
    cause = "differs from the copy in mp_rank_00_000/model_optim_rng.pt"
    assert faults(checkpoint) == [Fault(file, ROUTER, cause)]


def shift(folder: Path, layer: int) -> list[AtomId]:
    """Move every optimizer state of a layer's experts on by one element."""
    moved = []
    for atom in open_checkpoint(folder).tensors.atoms:
        if atom.role != "weight" and atom.name.startswith(f"decoder.layers.{layer}.mlp.experts"):
            overwrite(folder, atom, np.roll(values_of(folder, atom), 1))
            moved.append(atom)
    return moved


@dist
def test_shifted_optimizer_state(checkpoint: Path) -> None:
    without_manifest(checkpoint)
    masters = [atom for atom in shift(checkpoint, 0) if atom.role == "master"]
    found = faults(checkpoint)
    assert {fault.tensor for fault in found[:-1]} == {str(atom) for atom in masters}
    for fault in found[:-1]:
        assert fault.file.endswith(".distcp")
        assert fault.cause.endswith("of 64 masters round to their weight")
    assert found[-1][:2] == (".metadata", "optimizer state")
    assert found[-1].cause == (
        f"masters of {len(masters)} tensors are not their weights': Megatron up to 0.19.2 writes "
        "fully_reshardable state shifted when a buffer has several buckets with padding (its PR "
        "5077). The moments are shifted too. Resume with --no-load-optim, or from an earlier save; "
        "reshard with --optim drop"
    )


@legacy
def test_shifted_masters_of_another_kind_have_no_known_cause(checkpoint: Path) -> None:
    without_manifest(checkpoint)
    masters = [atom for atom in shift(checkpoint, 0) if atom.role == "master"]
    found = faults(checkpoint)
    assert {fault.tensor for fault in found} == {str(atom) for atom in masters}
    assert not any("5077" in fault.cause for fault in found)


@both
def test_an_expert_that_was_never_trained(checkpoint: Path) -> None:
    without_manifest(checkpoint)
    for name in ("linear_fc1.weight.gate", "linear_fc1.weight.up", "linear_fc2.weight"):
        atom = AtomId(f"decoder.layers.1.mlp.experts.2.{name}", "exp_avg_sq")
        verdict = verify(open_checkpoint(checkpoint), workers=1)
        assert verdict.warnings == []
        overwrite(checkpoint, atom, np.zeros((8, 8), np.uint32))
    verdict = verify(open_checkpoint(checkpoint), workers=1)
    assert verdict.faults == []
    assert verdict.warnings == [
        "decoder.layers.1: experts [2] were never trained: their second moments are all zero"
    ]


def test_rounding_is_torch_s() -> None:
    bits = np.random.default_rng(0).integers(0, 0x7F80_0000, 10_000, np.uint32)
    bits = np.concatenate([bits, bits | 0x8000_0000, [0, 0x3F80_8000, 0x3F81_8000]])
    bits = bits.astype(np.uint32)
    rounded = torch.from_numpy(bits.view(np.float32)).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(to_bfloat16(bits), rounded)


def differences(a: Path, b: Path) -> list[Fault]:
    return compare(open_checkpoint(a), open_checkpoint(b), {}, {})


TARGETS: list[dict[str, Any]] = [
    {"form": "torch", "tp": 2, "pp": 2, "ep": 1, "etp": 1, "optim": "fully"},
    {"form": "torch_dist", "tp": 2, "ep": 2, "etp": 2, "dp": 2, "optim": "dp"},
    {"form": "torch", "ep": 4, "tp": 1, "dp": 4, "etp": 1, "optim": "plain", "divisible_by": 128},
]


@both
@pytest.mark.parametrize("wishes", TARGETS, ids=lambda w: f"{w['form']}-{w['optim']}")
def test_equal_in_any_form(checkpoint: Path, tmp_path: Path, wishes: dict[str, Any]) -> None:
    reshard(open_checkpoint(checkpoint), tmp_path / "b", **wishes)
    assert differences(checkpoint, tmp_path / "b") == []
    assert differences(tmp_path / "b", checkpoint) == []
    without_manifest(tmp_path / "b")
    edit_atom(tmp_path / "b", AtomId(EXPERT, "exp_avg"), flip)
    fault = Fault(
        str(tmp_path / "b" / "iter_0000007"), f"{EXPERT} [exp_avg]",
        "differs in 1 of 64 elements, first at [0, 0]",
    )  # fmt: skip
    assert differences(checkpoint, tmp_path / "b") == [fault]


@dist
def test_padding_of_the_vocabulary_may_differ_but_nothing_else(
    checkpoint: Path, tmp_path: Path
) -> None:
    reshard(open_checkpoint(checkpoint), tmp_path / "b", divisible_by=32)
    name = "embedding.word_embeddings.weight"

    def last_row(box: np.ndarray) -> None:
        box[13:] = 1  # rows from the true vocabulary on

    edit_atom(tmp_path / "b", AtomId(name), last_row)
    assert differences(checkpoint, tmp_path / "b") == []

    def true_row(box: np.ndarray) -> None:
        box[12] = 1

    edit_atom(tmp_path / "b", AtomId(name), true_row)
    where = str(tmp_path / "b" / "iter_0000007")
    expected = [Fault(where, name, "differs in its first 13 rows")]
    assert differences(checkpoint, tmp_path / "b") == expected


def test_masters_of_an_fp32_run_may_be_its_weights(tmp_path: Path) -> None:
    arch = Arch(half=False)
    a = made(tmp_path / "a", arch, form="torch_dist", optim="fully", **{"ep": 2, "dp": 2})
    reshard(open_checkpoint(a), tmp_path / "b", form="torch", optim="plain")
    without = {atom.role for atom in open_checkpoint(tmp_path / "b").tensors.atoms}
    assert without == {"weight", "exp_avg", "exp_avg_sq"}
    assert differences(a, tmp_path / "b") == differences(tmp_path / "b", a) == []


@dist
def test_what_one_side_lacks_is_named(checkpoint: Path, tmp_path: Path) -> None:
    reshard(open_checkpoint(checkpoint), tmp_path / "b", optim="drop")
    found = differences(checkpoint, tmp_path / "b")
    atoms = open_checkpoint(checkpoint).tensors.atoms
    states = sorted(str(atom) for atom in atoms if atom.role != "weight")
    assert sorted(fault.tensor for fault in found) == states
    where = str(tmp_path / "b" / "iter_0000007")
    assert {(fault.file, fault.cause) for fault in found} == {(where, "is missing")}


def test_another_type_or_shape_is_named(tmp_path: Path) -> None:
    a = made(tmp_path / "a", Arch(), optimizer=False, form="torch_dist")
    b = made(tmp_path / "b", Arch(half=False, hidden=16), optimizer=False, form="torch_dist")
    c = made(tmp_path / "c", Arch(hidden=16), optimizer=False, form="torch")
    causes = {fault.tensor: fault.cause for fault in differences(a, b)}
    assert causes[ROUTER] == "is float32, was bfloat16"
    causes = {fault.tensor: fault.cause for fault in differences(a, c)}
    assert causes[ROUTER] == "has shape [4, 16], had [4, 8]"
    assert causes["embedding.word_embeddings.weight"] == "has shape [16, 16], had [16, 8]"
