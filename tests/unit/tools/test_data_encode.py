"""Bytes to ids: round trips, what is replaced or refused, and the same for any workers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megatron_moe.tools.data import tokenizer
from megatron_moe.tools.data.encode import Encoding, encode_all, encoder, texts
from megatron_moe.tools.data.pieces import Batch, Piece
from megatron_moe.tools.data.sources import DataError

WORDS = ["def return import", "the quick brown fox", "été 漢字 😀", "    indented\n\n"]
BPE = tokenizer.learn(iter(WORDS * 50), 300).to_str()
EOD = 0


def one(text: str, **kwargs) -> Batch:
    return Batch((Piece("a.txt", text.encode(), **kwargs),), len(text.encode()))


@given(st.text().filter(str.strip))
def test_bpe_gives_the_text_back(text):
    done = encoder(Encoding(BPE, EOD, "text"))(one(text))
    assert done.ids[-1] == EOD and EOD not in done.ids[:-1]
    wanted = text.removeprefix("\ufeff")
    decode = Tokenizer.from_str(BPE).decode
    assert decode(done.ids[:-1].tolist(), skip_special_tokens=False) == wanted
    assert done.lengths == [done.ids.size] and done.text_bytes == len(wanted.encode())


@given(st.text().filter(str.strip))
def test_bytes_are_their_own_ids_and_the_saved_tokenizer_agrees(text):
    done = encoder(Encoding(None, 256, "text"))(one(text))
    wanted = text.removeprefix("\ufeff")
    assert bytes(done.ids[:-1].tolist()).decode() == wanted
    assert done.ids[-1] == 256
    saved = tokenizer.byte_tokenizer()
    saved.encode_special_tokens = True
    assert saved.encode(wanted).ids == done.ids[:-1].tolist()


def test_an_end_of_document_written_in_the_text_is_text():
    done = encoder(Encoding(BPE, EOD, "text"))(one(f"a{tokenizer.EOD}b"))
    assert done.ids.tolist().count(EOD) == 1


def test_only_the_last_piece_ends_the_document():
    pieces = (Piece("a", b"one\n", last=False), Piece("a", b"two\n", first=False))
    done = encoder(Encoding(None, 256, "text"))(Batch(pieces, 8))
    assert bytes(done.ids[:4].tolist()) == b"one\n"
    assert done.lengths == [4, 5] and done.ends == [False, True]


def test_empty_documents_are_counted_and_left_out():
    pieces = (Piece("a", b""), Piece("b", b" \n"), Piece("c", b'{"text":""}\n', line=1))
    done = encoder(Encoding(None, 256, "text"))(Batch(pieces, 2))
    assert (done.empty, done.ids.size, done.ends) == (3, 0, [])


def test_undecodable_bytes_are_replaced_and_counted_by_file():
    pieces = (Piece("latin.txt", b"caf\xe9 cr\xe8me \xef\xbf\xbd"), Piece("good.txt", b"fine"))
    done = encoder(Encoding(None, 256, "text"))(Batch(pieces, 2))
    assert dict(done.replaced) == {"latin.txt": 2}  # the U+FFFD that was there is not counted


def test_half_a_surrogate_pair_in_json_is_replaced():
    [(text, replaced)] = texts(Piece("a.jsonl", b'{"text": "x\\ud83dy"}', line=1), "text")
    assert (text, replaced) == ("x\ufffdy", 1)


def test_json_lines_are_documents_and_blank_ones_nothing():
    raw = b'\xef\xbb\xbf{"text":"one"}\n\n{"id":2,"text":"two\\nlines"}\r\n'
    assert [t for t, _ in texts(Piece("a.jsonl", raw, line=1), "text")] == ["one", "two\nlines"]
    assert [t for t, _ in texts(Piece("a", b'{"body":"b"}', line=1), "body")] == ["b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a.jsonl:8: not JSON (Expecting property name enclosed in double quotes, column 2);"),
        ("[1]", "a.jsonl:8: a list, where an object with a text is wanted"),
        (
            '{"body":"","id":1}',
            'a.jsonl:8: no key "text"; choose one of its keys with --json-key: body, id',
        ),
        ("{}", 'a.jsonl:8: no key "text"; choose one of its keys with --json-key: it has none'),
        ('{"text":null}', 'a.jsonl:8: "text" is a null, not a string'),
        ("[" * 100_000, "a.jsonl:8: nested too deeply; mend or remove the line"),
    ],
)
def test_a_bad_json_line_is_named_by_file_and_line(line, message):
    raw = f'{{"text":"fine"}}\n{line}\n'.encode()
    with pytest.raises(DataError) as error:
        list(texts(Piece("a.jsonl", raw, line=7), "text"))
    assert str(error.value).startswith(message)


def test_two_workers_give_what_one_gives_in_order():
    todo = [one(f"{word} {i}\n") for i in range(30) for word in WORDS]
    encoding = Encoding(BPE, EOD, "text")
    alone = list(encode_all(todo, encoding, workers=1))
    shared = list(encode_all(todo, encoding, workers=2))
    assert len(alone) == len(shared) == len(todo)
    for a, b in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        assert (a.lengths, a.ends, a.text_bytes) == (b.lengths, b.ends, b.text_bytes)


def test_a_workers_fault_reaches_the_user():
    bad = Batch((Piece("a.jsonl", b"{", line=1),), 1)
    with pytest.raises(DataError, match=r"a\.jsonl:1: not JSON"):
        list(encode_all([one("x"), bad], Encoding(None, 256, "text"), workers=2))


def test_a_dead_worker_is_reported(capfd):
    with pytest.raises(DataError) as error:
        list(encode_all([one("x")], Encoding("no tokenizer", 0, "text"), workers=2))
    assert str(error.value) == (
        "one of 2 worker processes died, as when memory runs out; try fewer with --workers"
    )
