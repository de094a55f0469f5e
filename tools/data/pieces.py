"""Files to batches of raw bytes, read once, in order, in bounded memory.

A text file is one document. A large one is cut at line ends into consecutive *sequences* of that
document, since Megatron's ``--split`` divides sequences: a corpus of one book could have no
validation part otherwise. A JSON-lines file travels in blocks of whole lines.
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, cast

from megatron_moe.tools.data.sources import DataError, Source

BATCH_BYTES = 512 * 1024
_WHOLE = 256 * 1024  # a text file up to this size is one sequence
_SMALLEST, _LARGEST, _CUTS = 16 * 1024, 1024 * 1024, 256
_LONGEST_LINE = 1024 * 1024


@dataclass(frozen=True)
class Piece:
    """Some bytes of one file.

    Args:
        name: The file's name, for messages.
        raw: Whole lines of JSON, or a text file's next bytes.
        line: Number of the first JSON line, from 1; 0 for text.
        first: Whether a text document starts here.
        last: Whether a text document ends here.
    """

    name: str
    raw: bytes
    line: int = 0
    first: bool = True
    last: bool = True


@dataclass(frozen=True)
class Batch:
    """Pieces that go to a worker together, and the bytes on disk they stand for."""

    pieces: tuple[Piece, ...]
    consumed: int


def batches(sources: tuple[Source, ...], limit: int | None = None) -> Iterator[Batch]:
    """Yield the bytes of ``sources`` in order, about ``BATCH_BYTES`` at a time.

    Args:
        sources: Files, in the order to read them.
        limit: Stop after this many bytes of text or JSON; the piece that crosses it is the last.

    Raises:
        DataError: A file cannot be read, or its gzip stream is damaged.
    """
    waiting: list[Piece] = []
    size = consumed = total = 0
    for source in sources:
        for piece, on_disk in pieces(source):
            total += len(piece.raw)
            full = limit is not None and total >= limit
            if full:
                piece = replace(piece, last=True)
            waiting.append(piece)
            size += len(piece.raw)
            consumed += on_disk
            if size >= BATCH_BYTES or full:
                yield Batch(tuple(waiting), consumed)
                waiting, size, consumed = [], 0, 0
            if full:
                return
    if waiting:
        yield Batch(tuple(waiting), consumed)


def pieces(source: Source) -> Iterator[tuple[Piece, int]]:
    """Yield the pieces of one file, each with the bytes on disk read for it."""
    with source.path.open("rb") as file:
        if source.kind == "text":
            yield from _text(source, file)
        elif source.kind == "jsonl":
            yield from _lines(source, file, file)
        else:
            try:
                with gzip.GzipFile(fileobj=file) as stream:
                    yield from _lines(source, cast(IO[bytes], stream), file)
            except EOFError as error:
                raise DataError(
                    f"{source.name}: the gzip stream ends too early; the file is incomplete, "
                    "fetch it again"
                ) from error
            except (gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"{source.name}: not a sound gzip file ({error})") from error


def sequence_bytes(size: int) -> int:
    """Return the bytes of a sequence of a text file of ``size`` bytes."""
    if size <= _WHOLE:
        return _WHOLE
    return min(max(size // _CUTS, _SMALLEST), _LARGEST)


def _text(source: Source, file: IO[bytes]) -> Iterator[tuple[Piece, int]]:
    size = sequence_bytes(source.size)
    first = True
    raw = _until_line_end(file, size)
    while True:
        # Read ahead: only the next read tells whether this piece is the last.
        following = _until_line_end(file, size)
        yield Piece(source.name, raw, first=first, last=not following), len(raw)
        if not following:
            return
        raw, first = following, False


def _until_line_end(file: IO[bytes], size: int) -> bytes:
    raw = file.read(size)
    if len(raw) < size or raw.endswith(b"\n"):
        return raw
    raw += file.readline(_LONGEST_LINE)
    if raw.endswith(b"\n"):
        return raw
    # No line end near: cut between two characters, before the lead byte of the last one.
    cut = len(raw)
    while cut > len(raw) - 4 and raw[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    if raw[cut - 1] >= 0xC0 and file.peek(1):  # type: ignore[attr-defined]
        file.seek(cut - 1 - len(raw), 1)
        raw = raw[: cut - 1]
    return raw


def _lines(source: Source, stream: IO[bytes], file: IO[bytes]) -> Iterator[tuple[Piece, int]]:
    line, before = 1, 0
    while lines := stream.readlines(BATCH_BYTES):
        now = file.tell()
        yield Piece(source.name, b"".join(lines), line), now - before
        line += len(lines)
        before = now
