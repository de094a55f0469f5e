"""Bytes to token ids, in worker processes, results in the order of the input.

The order, and so the output, does not depend on the number of workers.
"""

import codecs
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from megatron_moe.tools.data.pieces import Batch, Piece
from megatron_moe.tools.data.sources import DataError

# Batches under way at most: bounds memory (half a megabyte of text each), and lets the workers
# run ahead while the writing process spends its first seconds importing Megatron.
_WINDOW = 64


@dataclass(frozen=True)
class Encoding:
    """What every worker needs to know.

    Args:
        tokenizer: Contents of a tokenizer.json; None takes each byte as its own id.
        eod: Id appended to each document.
        json_key: Key of the text in a JSON line.
    """

    tokenizer: str | None
    eod: int
    json_key: str


@dataclass
class Encoded:
    """The token ids of one batch.

    Args:
        ids: All sequences one after the other, int32, ``(tokens,)``.
        lengths: Tokens of each sequence.
        ends: For each sequence, whether its document ends with it.
        consumed: Bytes on disk that the batch stood for.
        text_bytes: Bytes of text, UTF-8.
        empty: Documents without text, left out.
        replaced: By file, how many undecodable places became U+FFFD.
    """

    ids: np.ndarray
    lengths: list[int]
    ends: list[bool]
    consumed: int
    text_bytes: int = 0
    empty: int = 0
    replaced: Counter[str] = field(default_factory=Counter)


def texts(piece: Piece, json_key: str) -> Iterator[tuple[str, int]]:
    """Yield each text of a piece and how many undecodable places in it were replaced.

    Raises:
        DataError: A JSON line is no object with a string at ``json_key``.
    """
    at_start = piece.first and piece.line <= 1
    content = piece.raw.removeprefix(codecs.BOM_UTF8) if at_start else piece.raw
    if piece.line == 0:
        yield _decode(content)
        return
    for number, raw in enumerate(content.split(b"\n"), piece.line):
        if raw.strip():
            line, replaced = _decode(raw)
            text = _text_of(line, json_key, f"{piece.name}:{number}")
            text, unpaired = _without_surrogates(text)
            yield text, replaced + unpaired


def encoder(encoding: Encoding) -> Callable[[Batch], Encoded]:
    """Return the function from a batch to its token ids."""
    if encoding.tokenizer is None:
        ids_of = _byte_ids
    else:
        tokenizer = Tokenizer.from_str(encoding.tokenizer)
        # "<|endoftext|>" written in a text is text: it must not end the document.
        tokenizer.encode_special_tokens = True

        def ids_of(text: str) -> np.ndarray:
            [result] = tokenizer.encode_batch_fast([text], add_special_tokens=False)
            return np.array(result.ids, dtype=np.int32)

    def encode(batch: Batch) -> Encoded:
        parts: list[np.ndarray] = []
        done = Encoded(np.empty(0, np.int32), [], [], batch.consumed)
        for piece in batch.pieces:
            for text, replaced in texts(piece, encoding.json_key):
                if piece.first and piece.last and not text.strip():
                    done.empty += 1
                    continue
                ids = ids_of(text)
                if piece.last:
                    ids = np.append(ids, np.int32(encoding.eod))
                parts.append(ids)
                done.lengths.append(ids.size)
                done.ends.append(piece.last)
                done.text_bytes += len(text.encode())
                if replaced:
                    done.replaced[piece.name] += replaced
        done.ids = np.concatenate([done.ids, *parts])
        return done

    return encode


def encode_all(
    batches: Iterable[Batch], encoding: Encoding, workers: int
) -> Generator[Encoded, None, None]:
    """Yield the encoded batches in order, from ``workers`` processes (1: from this one).

    Raises:
        DataError: What a worker met in the text, or a worker that died.
    """
    if workers == 1:
        yield from map(encoder(encoding), batches)
        return
    # spawn: forking a process whose libraries have started threads can deadlock the child.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (encoding,)
    )
    under_way: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            under_way.append(pool.submit(_encode, batch))
            if len(under_way) >= max(_WINDOW, 4 * workers):
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} worker processes died, as when memory runs out; "
            "try fewer with --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encode: Callable[[Batch], Encoded]  # in a worker process only, set when it starts


def _start_worker(encoding: Encoding) -> None:
    global _worker_encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread: the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_encode = encoder(encoding)


def _end_with_parent() -> None:
    # A parent killed outright closes nothing that a pool worker would notice.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(batch: Batch) -> Encoded:
    return _worker_encode(batch)


def _byte_ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)


def _decode(raw: bytes) -> tuple[str, int]:
    try:
        return raw.decode(), 0
    except UnicodeDecodeError:
        text = raw.decode(errors="replace")
        return text, text.count("\ufffd") - raw.count("\ufffd".encode())


def _without_surrogates(text: str) -> tuple[str, int]:
    # JSON may hold half a surrogate pair ("\ud83d"), which no UTF-8 text can.
    try:
        text.encode()
    except UnicodeEncodeError:
        clean = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
        return clean, clean.count("\ufffd") - text.count("\ufffd")
    return text, 0


def _text_of(line: str, key: str, place: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        what = f"{error.msg}, column {error.colno}"
        raise DataError(f"{place}: not JSON ({what}); mend or remove the line") from error
    except RecursionError as error:
        raise DataError(f"{place}: nested too deeply; mend or remove the line") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: a {_kind(value)}, where an object with a text is wanted")
    if key not in value:
        raise DataError(
            f'{place}: no key "{key}"; choose one of its keys with --json-key: '
            + (", ".join(value) or "it has none")
        )
    if not isinstance(value[key], str):
        raise DataError(f'{place}: "{key}" is a {_kind(value[key])}, not a string')
    return value[key]


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", list: "list"}
    return names.get(type(value), "string" if isinstance(value, str) else "object")
