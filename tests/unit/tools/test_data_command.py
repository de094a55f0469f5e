"""The command from text to what Megatron reads, and what a killed run leaves."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner, Result

from megatron_moe.tools.data import command, flags, output, tokenizer

LATIN = "latin.txt"
TEXTS = {
    "code/a.py": "def f(x):\n    return x + 1\n" * 40,
    "code/b.py": f"# é 漢 😀 {tokenizer.EOD}\r\n\tx = 'y'\n",
    "prose.md": "The quick brown fox jumps over the lazy dog.\n" * 30,
}
LINES = ["first document", "second:\n two lines"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder with code, prose, JSON lines, an empty file, Latin-1 and a picture."""
    root = tmp_path_factory.mktemp("text")
    for name, content in TEXTS.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content.encode())
    packed = "".join(json.dumps({"text": line}) + "\n" for line in LINES)
    (root / "lines.jsonl.gz").write_bytes(gzip.compress(packed.encode()))
    (root / "empty.txt").write_text("\n")
    (root / LATIN).write_bytes(b"caf\xe9\n")
    (root / "picture.png").write_bytes(b"\x89PNG\0")
    return root


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(text, tmp_path_factory) -> tuple[Path, Result]:
    prefix = tmp_path_factory.mktemp("made") / "corpus"
    result = run(text, "--out", prefix, "--vocab-size", 400, "--workers", 2)
    assert result.exit_code == 0, result.output
    return prefix, result


def documents(prefix: Path) -> set[str]:
    """Decode every document through Megatron's dataset and tokenizer classes."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    dataset = IndexedDataset(str(prefix))
    theirs = build_tokenizer(tokenizer.megatron_arguments(output.beside(prefix, "tokenizer")))
    found = set()
    ends = dataset.document_indices
    for begin, end in pairwise(ends):
        ids = [int(token) for i in range(begin, end) for token in dataset[i]]
        assert ids[-1] == theirs.eod and theirs.eod not in ids[:-1]
        found.add(theirs.detokenize(ids[:-1]))
    assert theirs.vocab_size == output.read_manifest(prefix).vocab_size
    return found


def test_megatron_reads_every_document_back(made):
    prefix, _ = made
    assert documents(prefix) == {*TEXTS.values(), *LINES, "caf\ufffd\n"}


def test_bytes_too_and_megatrons_own_ids_are_the_bytes(text, tmp_path):
    result = run(text / "prose.md", "--out", tmp_path / "b", "--tokenizer", "byte", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert documents(tmp_path / "b") == {TEXTS["prose.md"]}
    manifest = output.read_manifest(tmp_path / "b")
    assert (manifest.vocab_size, manifest.eod) == (257, 256)
    assert manifest.tokens == len(TEXTS["prose.md"]) + 1


def test_one_worker_writes_the_same_bytes(text, made, tmp_path):
    prefix, _ = made
    result = run(text, "--out", tmp_path / "other", "--vocab-size", 400, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert output.read_manifest(tmp_path / "other").files == output.read_manifest(prefix).files


def test_your_own_tokenizer_is_tried_in_megatrons_class_and_copied(text, made, tmp_path):
    prefix, _ = made
    given = output.beside(prefix, "tokenizer")
    again = tmp_path / "again"
    result = run(text, "--out", again, "--tokenizer", given, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert output.beside(again, "bin").read_bytes() == output.beside(prefix, "bin").read_bytes()
    assert output.read_manifest(again).request["tokenizer"] == (
        f"sha256:{output.sha256(given / 'tokenizer.json')}"
    )


def test_the_end_says_what_was_made_and_megatrons_flags(text, made):
    prefix, result = made
    manifest = output.read_manifest(prefix)
    assert manifest.documents == 6 and manifest.sequences == 6
    assert manifest.text_bytes == sum(
        len(t.encode()) for t in [*TEXTS.values(), *LINES, "caf\ufffd\n"]
    )
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{prefix}: {manifest.tokens:,} tokens in 6 documents, from 0.0 MB")
    assert lines[1] == "  left out: 1 empty documents"
    assert lines[2].startswith(f"  left out: {text.name}/picture.png is not text")
    assert lines[3] == f"  not UTF-8, replaced by U+FFFD: {text.name}/{LATIN} (1)"
    assert lines[-2:] == ["Megatron's flags:", "  " + " ".join(flags(prefix))]
    assert " tokens, " in result.stderr and " MB/s, " in result.stderr  # lines: no terminal here


def test_a_second_run_is_up_to_date_and_others_are_refused(text, made):
    prefix, _ = made
    before = output.beside(prefix, "bin").stat()
    again = run(text, "--out", prefix, "--vocab-size", 400)
    assert (again.exit_code, again.stdout.splitlines()[0]) == (0, f"{prefix} is up to date")
    assert output.beside(prefix, "bin").stat() == before
    other = run(text, "--out", prefix, "--vocab-size", 500)
    assert other.exit_code == 1
    assert other.stderr.splitlines()[-1] == (
        f"Error: {prefix} was made with vocab_size 400, not 500; pass --force to replace it, "
        "or choose another --out"
    )


def test_force_replaces(text, tmp_path):
    run(text, "--out", tmp_path / "x", "--tokenizer", "byte", "--workers", 1)
    one = run(text / "prose.md", "--out", tmp_path / "x", "--tokenizer", "byte", "--force")
    assert one.exit_code == 0, one.output
    assert documents(tmp_path / "x") == {TEXTS["prose.md"]}
    assert "one sequence only: nothing is left to validate on" in one.stdout


def test_killed_outright_it_leaves_nothing_and_the_next_run_completes(text, made, tmp_path):
    prefix = tmp_path / "corpus"
    arguments = [text, "--out", prefix, "--vocab-size", 400, "--workers", 2]
    process = subprocess.Popen(
        [sys.executable, "-c", "from megatron_moe.tools.data import command; command()",
         *map(str, arguments)], stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        children = _workers_of(process)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.partial"]
    with pytest.raises(ValueError, match=r"corpus\.json is missing"):
        flags(prefix)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, "the workers outlived the command"
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert output.read_manifest(prefix).files == output.read_manifest(made[0]).files
    assert not output.beside(prefix, "partial").exists()


def _workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Wait until the command encodes: it is then importing Megatron, for seconds."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the command ended before it could be killed"
        children = psutil.Process(process.pid).children(recursive=True)
        if any("spawn_main" in " ".join(child.cmdline()) for child in children):
            return children
        time.sleep(0.02)
    raise AssertionError("no workers within 60 s")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--vocab-size", 100],
            "--vocab-size (100) must be at least 257: 256 bytes and the end-of-document token",
        ),
        (["--limit-mb", 0], "--limit-mb (0) must be above 0"),
        (["--out", "x.bin"], "--out (x.bin) takes a prefix; leave out .bin"),
        (["--out", "."], "--out (.) names no file; give a prefix such as data/corpus"),
        (
            ["--tokenizer", "nope"],
            "--tokenizer (nope) is neither bpe, byte nor a folder with a tokenizer.json",
        ),
        (
            ["--tokenizer", "."],
            "--tokenizer (.) has no tokenizer.json; save it with transformers' save_pretrained",
        ),
    ],
)
def test_a_wrong_option_is_one_sentence(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    result = run("a.txt", "--out", "x", *options)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, f"Error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n", "no text in the input: 1 file(s) read, all of them empty"),
        ("a.jsonl", '{"body": "x"}', 'no key "text"; choose one of its keys with --json-key: body'),
    ],
)
def test_a_fault_in_the_text_leaves_nothing(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    result = run(tmp_path / name, "--out", tmp_path / "x", "--workers", 1)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].endswith(message)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")

    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / "x.partial/bin"))

    monkeypatch.setattr(output, "describe", full)
    result = run(tmp_path / "a.txt", "--out", tmp_path / "x", "--tokenizer", "byte", "--workers", 1)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        f"Error: {tmp_path / 'x.partial/bin'}: No space left on device"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
