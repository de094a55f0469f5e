"""Which files are read, in what order, and what is refused."""

import gzip
import sysconfig
from pathlib import Path

import pytest

from megatron_moe.tools.data.sources import DataError, find_sources


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.with_name(path.name + ".txt")).write_text(text)
    return root


def names(*inputs: Path, prefix: Path = Path("nowhere")) -> list[str]:
    return [source.name for source in find_sources(inputs, prefix).sources]


def test_the_order_is_that_of_names_and_not_of_folders_or_places(tmp_path):
    files = {f"{package}__{i}": "x" for package in ("a", "b") for i in range(20)}
    here = names(write(tmp_path / "one" / "corpus", **files))
    there = names(write(tmp_path / "two" / "corpus", **files))
    assert here == there
    assert sorted(here) != here
    # Cut anywhere near the middle, both packages are on both sides.
    assert {name.split("/")[1] for name in here[:10]} == {"a", "b"}


def test_hidden_names_and_the_output_are_not_input(tmp_path):
    write(tmp_path, keep="x", _git__config="x")
    (tmp_path / "_git").rename(tmp_path / ".git")
    (tmp_path / ".hidden").write_text("x")
    for made in ("out.bin", "out.idx", "out.json"):
        (tmp_path / made).write_text("x")
    for made in ("out.tokenizer", "out.partial", "out"):
        write(tmp_path / made, inner="x")
    assert names(tmp_path, prefix=tmp_path / "out") == [f"{tmp_path.name}/keep.txt"]


def test_a_folder_tells_what_it_left_out(tmp_path):
    write(tmp_path, good="x")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "data.json").write_text("[]")
    catalogue = find_sources([tmp_path], Path("nowhere"))
    assert [s.path.name for s in catalogue.sources] == ["good.txt"]
    assert catalogue.skipped == {
        f"{tmp_path.name}/picture.png": (
            "is not text (it holds zero bytes); give text, .jsonl or .jsonl.gz"
        ),
        f"{tmp_path.name}/data.json": (
            "is one JSON value; write one object a line and name the file .jsonl"
        ),
    }


def test_without_input_it_is_the_standard_library():
    catalogue = find_sources((), Path("nowhere"))
    found = {source.name for source in catalogue.sources}
    assert {"os.py", "json/decoder.py"} <= found
    assert not any("site-packages" in name for name in found)
    root = Path(sysconfig.get_path("stdlib"))
    assert all(source.path == root / source.name for source in catalogue.sources)


def test_the_digest_follows_content_and_not_order(tmp_path):
    write(tmp_path, a="x", b="y")
    first = find_sources([tmp_path / "a.txt", tmp_path / "b.txt"], Path("nowhere")).digest()
    assert find_sources([tmp_path / "b.txt", tmp_path / "a.txt"], Path("nowhere")).digest() == first
    write(tmp_path, b="longer")
    assert find_sources([tmp_path / "a.txt", tmp_path / "b.txt"], Path("nowhere")).digest() != first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bin.txt", b"a\0b", "is not text (it holds zero bytes); give text, .jsonl or .jsonl.gz"),
        ("w.txt", "hi".encode("utf-16"), "is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8"),
        (
            "x.json",
            b"[]",
            "is one JSON value; write one object a line and name the file .jsonl",
        ),
        (
            "x.txt.gz",
            gzip.compress(b"x"),
            "is compressed; only .jsonl.gz is read so, unpack it first",
        ),
    ],
)
def test_a_file_of_the_wrong_kind_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        find_sources([path], Path("nowhere"))
    assert str(error.value) == f"{path} {message}"


def test_a_missing_input_is_named(tmp_path):
    with pytest.raises(DataError) as error:
        find_sources([tmp_path / "nope"], Path("nowhere"))
    assert str(error.value) == (
        f"INPUT ({tmp_path / 'nope'}) does not exist; "
        "give a text file, a .jsonl, a .jsonl.gz or a folder"
    )


def test_a_folder_without_text_is_named(tmp_path):
    (tmp_path / "p.png").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"holds no text file \(1 left out: .*p\.png is not text"):
        find_sources([tmp_path], Path("nowhere"))
