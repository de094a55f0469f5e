"""Files to pieces: nothing lost, nothing doubled, cut where text may be cut."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.tools.data import pieces as module
from megatron_moe.tools.data.pieces import batches, pieces, sequence_bytes
from megatron_moe.tools.data.sources import DataError, Source, find_sources


@pytest.fixture
def small(monkeypatch):
    """Sizes at which a few bytes are a large file."""
    monkeypatch.setattr(module, "_WHOLE", 8)
    monkeypatch.setattr(module, "_SMALLEST", 4)
    monkeypatch.setattr(module, "_LONGEST_LINE", 6)
    monkeypatch.setattr(module, "BATCH_BYTES", 10)


def source(path: Path, content: bytes) -> Source:
    path.write_bytes(content)
    return find_sources([path], Path("nowhere")).sources[0]


@given(text=st.text(alphabet="aé漢😀\n \r", max_size=60))
def test_text_pieces_are_the_file_and_each_is_text(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("t") / "a.txt"
    with pytest.MonkeyPatch.context() as patch:
        for name, size in {"_WHOLE": 8, "_SMALLEST": 4, "_LONGEST_LINE": 6}.items():
            patch.setattr(module, name, size)
        found = [piece for piece, _ in pieces(source(path, text.encode()))]
    assert "".join(piece.raw.decode() for piece in found) == text
    assert [piece.first for piece in found] == [True] + [False] * (len(found) - 1)
    assert [piece.last for piece in found] == [False] * (len(found) - 1) + [True]
    assert all(len(piece.raw) <= 8 + 6 for piece in found)


@given(content=st.binary(max_size=60).filter(lambda b: b"\0" not in b and b[:2] != b"\xff\xfe"))
def test_no_byte_is_lost_whatever_the_bytes(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("t") / "a.txt"
    if content.startswith(b"\xfe\xff"):
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, size in {"_WHOLE": 8, "_SMALLEST": 4, "_LONGEST_LINE": 6}.items():
            patch.setattr(module, name, size)
        found = list(pieces(source(path, content)))
    assert b"".join(piece.raw for piece, _ in found) == content
    assert sum(consumed for _, consumed in found) == len(content)


def test_a_large_text_is_cut_at_line_ends(tmp_path, small):
    found = [p.raw for p, _ in pieces(source(tmp_path / "a.txt", b"ab\ncdef\ngh\nij\n"))]
    assert found == [b"ab\ncdef\n", b"gh\nij\n"]


@pytest.mark.parametrize(
    ("size", "wanted"),
    [(100, 2**18), (2**18, 2**18), (2**18 + 1, 2**14), (2**28, 2**20), (2**40, 2**20)],
)
def test_a_book_has_enough_sequences_to_validate_on(size, wanted):
    assert sequence_bytes(size) == wanted


@pytest.mark.parametrize("packed", [False, True])
def test_json_blocks_know_their_first_line(tmp_path, small, packed):
    content = b'{"a":1}\n\n{"a":22}\n{"a":3}'
    name, content_on_disk = ("a.jsonl", content)
    if packed:
        name, content_on_disk = ("a.jsonl.gz", gzip.compress(content))
    found = list(pieces(source(tmp_path / name, content_on_disk)))
    assert b"".join(piece.raw for piece, _ in found) == content
    lines = 1
    for piece, _ in found:
        assert piece.line == lines
        lines += piece.raw.count(b"\n")
    assert len(found) > 1
    assert sum(consumed for _, consumed in found) == len(content_on_disk)


def test_batches_keep_the_order_and_count_the_bytes(tmp_path, small):
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(f"{i}\n" * 3)
    catalogue = find_sources([tmp_path], Path("nowhere"))
    made = list(batches(catalogue.sources))
    assert [p.name for b in made for p in b.pieces] == [s.name for s in catalogue.sources]
    assert sum(b.consumed for b in made) == catalogue.size
    assert len(made) == 5


def test_the_limit_ends_the_document_it_cuts(tmp_path, small):
    text = source(tmp_path / "a.txt", b"ab\ncdef\n" * 10)
    made = [p for b in batches((text,), limit=20) for p in b.pieces]
    assert sum(len(p.raw) for p in made) == 24
    assert [p.last for p in made] == [False, False, True]


def test_a_truncated_gzip_is_named(tmp_path):
    cut = source(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text":"hello"}\n' * 1000)[:-20])
    with pytest.raises(DataError) as error:
        list(pieces(cut))
    assert str(error.value) == (
        f"{cut.name}: the gzip stream ends too early; the file is incomplete, fetch it again"
    )


@pytest.mark.parametrize("content", [b"plain text", gzip.compress(b"x" * 99)[:-8] + bytes(8)])
def test_a_damaged_gzip_is_named(tmp_path, content):
    bad = source(tmp_path / "a.jsonl.gz", content)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: not a sound gzip file \("):
        list(pieces(bad))
