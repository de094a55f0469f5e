"""Nothing unfinished looks finished, and nothing finished is replaced unasked."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_moe.tools.data import output
from megatron_moe.tools.data.output import Manifest, beside, flags, is_current, partial, publish
from megatron_moe.tools.data.sources import DataError

REQUEST = {"tokenizer": "bpe", "vocab_size": 300, "inputs": "abc"}


def make(prefix: Path, content: str = "new", sequences: int = 100) -> None:
    """Publish a dataset whose three parts all say ``content``."""
    with partial(prefix) as folder:
        (folder / "bin").write_text(content)
        (folder / "idx").write_text(content)
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.json").write_text(content)
        manifest = Manifest(
            request=dict(REQUEST), files=output.describe(folder), documents=1,
            sequences=sequences, tokens=1, text_bytes=1, bytes_per_token=1.0, vocab_size=300,
            eod=0, empty=0, replaced={}, skipped={}, seconds=0.0, command="",
        )  # fmt: skip
        publish(folder, prefix, manifest)


class Killed(BaseException):
    """Stands for the end of the process at some point."""


def die_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let the ``step``-th change of a directory be the last thing that happens."""
    done = 0

    def counted(original):
        def change(self, *args, **kwargs):
            nonlocal done
            done += 1
            if done > step:
                raise Killed
            return original(self, *args, **kwargs)

        return change

    patch.setattr(Path, "rename", counted(Path.rename))
    patch.setattr(output, "_remove", counted(output._remove))


@pytest.mark.parametrize("before", [False, True])
def test_killed_while_publishing_it_never_looks_finished(tmp_path, before):
    steps = 0
    while True:
        prefix = tmp_path / str(steps) / "corpus"
        if before:
            make(prefix, "old!")
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, steps)
            try:
                make(prefix)
                break
            except Killed:
                pass
        if beside(prefix, "json").exists():
            # Not yet touched: the old dataset, whole.
            assert is_current(prefix, REQUEST, force=False)
            assert {beside(prefix, e).read_text() for e in ("bin", "idx")} == {"old!"}
        else:
            with pytest.raises(DataError, match=r"corpus\.json is missing"):
                flags(prefix)
        if beside(prefix, "bin").exists() and beside(prefix, "idx").exists():
            assert beside(prefix, "bin").read_text() == beside(prefix, "idx").read_text()
        steps += 1
    assert steps >= 8
    assert is_current(prefix, REQUEST, force=False)
    assert sorted(p.name for p in prefix.parent.iterdir()) == [
        "corpus.bin", "corpus.idx", "corpus.json", "corpus.tokenizer"
    ]  # fmt: skip


def test_a_half_written_one_is_refused(tmp_path):
    make(tmp_path / "corpus")
    (tmp_path / "corpus.json").unlink()
    with pytest.raises(DataError) as error:
        is_current(tmp_path / "corpus", REQUEST, force=False)
    assert str(error.value) == (
        f"{tmp_path / 'corpus.bin'} is there without corpus.json: half-written, or not made by "
        "this command; pass --force to replace it, or choose another --out"
    )
    assert not is_current(tmp_path / "corpus", REQUEST, force=True)


@pytest.mark.parametrize(
    ("damage", "what"), [(lambda p: p.write_text("x"), "has 1 bytes"), (Path.unlink, "is missing")]
)
def test_files_that_disagree_with_the_manifest_are_refused(tmp_path, damage, what):
    make(tmp_path / "corpus")
    damage(tmp_path / "corpus.bin")
    message = (
        f"{tmp_path / 'corpus.bin'} {what}, corpus.json says 3: the dataset is damaged; "
        "pass --force to write it again"
    )
    for use in (flags, lambda prefix: is_current(prefix, REQUEST, force=False)):
        with pytest.raises(DataError) as error:
            use(tmp_path / "corpus")
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("change", "what"),
    [({"vocab_size": 400}, "vocab_size 300, not 400"), ({"inputs": "def"}, "other inputs")],
)
def test_other_options_are_refused(tmp_path, change, what):
    prefix = tmp_path / "corpus"
    make(prefix)
    with pytest.raises(DataError) as error:
        is_current(prefix, REQUEST | change, force=False)
    assert str(error.value) == (
        f"{prefix} was made with {what}; pass --force to replace it, or choose another --out"
    )


@pytest.mark.parametrize("content", ["[1]", "{}", "no json", '{"maker": "megatron-moe data"}'])
def test_a_strangers_json_is_never_replaced(tmp_path, content):
    (tmp_path / "corpus.json").write_text(content)
    with pytest.raises(DataError) as error:
        is_current(tmp_path / "corpus", REQUEST, force=True)
    assert str(error.value) == (
        f"{tmp_path / 'corpus.json'} is not a manifest of megatron-moe data; choose another --out"
    )


def test_a_folder_is_no_prefix_unless_megatron_made_it(tmp_path):
    with pytest.raises(DataError, match=r"is a folder; give a prefix in it, such as .*/corpus$"):
        is_current(tmp_path, REQUEST, force=False)
    (tmp_path / "cache").mkdir()
    assert not is_current(tmp_path, REQUEST, force=False)


def test_replacing_drops_megatrons_indices_of_the_old_data(tmp_path):
    make(tmp_path / "corpus", "old!")
    stale = tmp_path / "corpus" / "cache" / "GPTDataset_indices"
    stale.mkdir(parents=True)
    (stale / "x.npy").write_text("indices of the old data")
    make(tmp_path / "corpus")
    assert not stale.exists()


def test_a_second_writer_is_refused_and_leftovers_are_cleared(tmp_path):
    prefix = tmp_path / "corpus"
    (tmp_path / "corpus.partial" / "tokenizer").mkdir(parents=True)
    (tmp_path / "corpus.partial" / "bin").write_text("left by a killed run")
    with partial(prefix) as folder:
        assert [p.name for p in folder.iterdir()] == ["lock"]
        with pytest.raises(DataError) as error, partial(prefix):
            pass
        assert folder.is_dir()
    assert str(error.value) == (
        f"another process is writing {prefix} (corpus.partial is locked); "
        "wait for it, or choose another --out"
    )
    assert not folder.exists()


@pytest.mark.parametrize(
    ("sequences", "split"),
    [(1, "100,0,0"), (2, "50,50,0"), (30, "96,4,0"), (50, "98,2,0"), (9999, "98,2,0")],
)
def test_the_flags_leave_something_to_validate_on(tmp_path, sequences, split):
    prefix = tmp_path / "my.corpus"
    make(prefix, sequences=sequences)
    assert flags(str(prefix)) == [
        "--data-path", str(prefix),
        "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", f"{prefix}.tokenizer",
        "--make-vocab-size-divisible-by", "128",
        "--split", split,
    ]  # fmt: skip
    if sequences > 1:
        train = float(split.split(",")[0]) / 100
        assert round(train * sequences) < sequences


def test_flags_without_a_dataset(tmp_path):
    with pytest.raises(DataError) as error:
        flags(tmp_path / "corpus")
    assert str(error.value) == (
        f"no dataset at {tmp_path / 'corpus'}: corpus.json is missing; run megatron-moe data"
    )


def test_the_manifest_survives_its_file(tmp_path):
    make(tmp_path / "corpus")
    manifest = output.read_manifest(tmp_path / "corpus")
    assert json.loads((tmp_path / "corpus.json").read_text())["documents"] == 1
    assert replace(manifest) == manifest
    assert manifest.files["bin"] == {"bytes": 3, "sha256": output.sha256(tmp_path / "corpus.bin")}
