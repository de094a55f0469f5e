"""Which iteration is read, which format it has, and what is said when there is none."""

import json

import pytest

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.read.locate import locate


def make(folder, *files, tracker=None):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(
            json.dumps({"sharded_backend": "torch_dist"}) if name.endswith("metadata.json") else ""
        )
    if tracker is not None:
        (folder / "latest_checkpointed_iteration.txt").write_text(tracker)
    return folder


DIST = ("metadata.json", ".metadata", "__0_0.distcp")


def inside(folder, names):
    return [f"{folder}/{name}" for name in names]


def test_the_trackers_iteration(tmp_path):
    make(tmp_path, *inside("iter_0000005", DIST), *inside("iter_0000007", DIST), tracker="5\n")
    found = locate(tmp_path)
    assert (found.folder, found.iteration, found.form) == (
        tmp_path / "iter_0000005",
        5,
        "torch_dist",
    )
    assert locate(tmp_path, 7).folder.name == "iter_0000007"


def test_a_release(tmp_path):
    make(tmp_path, "release/mp_rank_00/model_optim_rng.pt", tracker="release")
    found = locate(tmp_path)
    assert (found.folder.name, found.iteration, found.form) == ("release", "release", "torch")


def test_an_iterations_own_folder(tmp_path):
    make(tmp_path, *inside("iter_0000012", DIST))
    assert locate(tmp_path / "iter_0000012").iteration == 12
    assert locate(tmp_path, 12).iteration == 12


@pytest.mark.parametrize(
    ("files", "tracker", "iteration", "message"),
    [
        (
            [],
            None,
            None,
            r"neither latest_checkpointed_iteration\.txt nor a checkpoint's files are "
            r"here; give the folder passed to --save",
        ),
        (inside("iter_0000005", DIST), None, None, r"it has iter_0000005: pass --iteration"),
        (
            inside("iter_0000005", DIST),
            "9",
            None,
            r"latest_checkpointed_iteration\.txt names "
            r"iter_0000009, which does not exist; there is iter_0000005\. Pass --iteration",
        ),
        ([], "9", None, r"names iter_0000009, which does not exist; there is no iteration"),
        (
            inside("iter_0000005", DIST),
            "5",
            6,
            r"--iteration asks for iter_0000006, which " r"does not",
        ),
        (
            [],
            "five",
            None,
            r"latest_checkpointed_iteration\.txt: holds 'five', "
            r"neither a number nor "
            r"'release'; pass --iteration",
        ),
        ([], "", None, r"holds '', neither a number"),
        ([], "²", None, r"holds '²', neither a number"),
        ([], "-3", None, r"holds '-3', neither a number"),
        (
            ["iter_0000005/metadata.json", "iter_0000005/__0_0.distcp"],
            "5",
            None,
            r"iter_0000005: has metadata\.json but no \.metadata: the save did not finish, or an "
            r"asynchronous one is still running\. Take an earlier iteration",
        ),
        (
            ["iter_0000005/__0_0.distcp"],
            "5",
            None,
            r"\.distcp files without \.metadata: the save "
            r"did "
            r"not finish\. Take an earlier iteration",
        ),
        (
            ["iter_0000005/.metadata", "iter_0000005/__0_0.distcp"],
            "5",
            None,
            r"\.metadata without metadata\.json: torch_dcp, fsdp_dtensor, or "
            r"a torch_dist save that is "
            r"still being written",
        ),
        (["iter_0000005/w/.zarray"], "5", None, r"zarr is not read: load it with Megatron 0\.15"),
        (["iter_0000005/notes.txt"], "5", None, r"holds no checkpoint that can be read"),
    ],
)
def test_what_cannot_be_found(tmp_path, files, tracker, iteration, message):
    with pytest.raises(CheckpointError, match=message):
        locate(make(tmp_path, *files, tracker=tracker), iteration)


def test_no_folder(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"gone: no such folder; give the folder passed to --save"
    ):
        locate(tmp_path / "gone")


def test_a_tracker_that_is_no_text(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(
        CheckpointError, match=r"iteration\.txt: holds .*neither a number nor 'release'"
    ):
        locate(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"sharded_backend": "zarr"}',
            r"format 'zarr' is not read\. zarr ended with Megatron 0\.15",
        ),
        ("{", r"metadata\.json: not JSON"),
        ("[]", r"metadata\.json: not a JSON object"),
        ("{}", r"format None is not read"),
    ],
)
def test_metadata_of_another_kind(tmp_path, content, message):
    make(tmp_path, *inside("iter_0000005", DIST), tracker="5")
    (tmp_path / "iter_0000005" / "metadata.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        locate(tmp_path)


def test_an_unfinished_save_without_a_tracker(tmp_path):
    make(tmp_path, ".metadata", "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"\.metadata without metadata\.json"):
        locate(tmp_path)
