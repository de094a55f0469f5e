"""The whole of it: find, choose the vocabulary, encode, write with Megatron, move into place."""

import logging
import shlex
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from megatron_moe.tools.data import output, tokenizer
from megatron_moe.tools.data.encode import Encoded, Encoding, encode_all
from megatron_moe.tools.data.pieces import batches
from megatron_moe.tools.data.progress import Progress
from megatron_moe.tools.data.sources import Catalogue, DataError, find_sources

_TRIAL_TEXTS, _TRIAL_CHARACTERS = 20, 2000


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asks for.

    Args:
        inputs: Files and folders; none takes Python's standard library.
        prefix: Where to write, without an ending.
        tokenizer: ``bpe``, ``byte`` or a tokenizer's folder.
        vocab_size: Ids of a learned vocabulary.
        workers: Processes that encode.
        json_key: Key of the text in a JSON line.
        limit_mb: Megabytes of input to read at most, about; None reads all.
        force: Whether to replace what is there.
    """

    inputs: tuple[Path, ...]
    prefix: Path
    tokenizer: str = "bpe"
    vocab_size: int = 8192
    workers: int = 1
    json_key: str = "text"
    limit_mb: float | None = None
    force: bool = False

    @property
    def limit(self) -> int | None:
        """The limit in bytes."""
        return None if self.limit_mb is None else int(self.limit_mb * 1e6)


@dataclass
class Totals:
    """Sums over all batches."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    replaced: Counter[str] = field(default_factory=Counter)

    def add(self, encoded: Encoded) -> None:
        """Add one batch."""
        self.documents += sum(encoded.ends)
        self.sequences += len(encoded.ends)
        self.tokens += encoded.ids.size
        self.text_bytes += encoded.text_bytes
        self.empty += encoded.empty
        self.replaced += encoded.replaced


def prepare(request: Request, progress: Progress) -> tuple[output.Manifest, bool]:
    """Make the dataset; return its manifest, and whether it was there already.

    Raises:
        DataError: A fault in the inputs, the options or what is at the prefix.
    """
    started = time.monotonic()
    _check(request)
    progress.stage("finding the text")
    catalogue = find_sources(request.inputs, request.prefix)
    wanted = _content(request, catalogue)
    if output.is_current(request.prefix, wanted, request.force):
        return output.read_manifest(request.prefix), True
    with output.partial(request.prefix) as folder:
        totals, vocab_size, eod = _write(request, catalogue, folder, progress)
        progress.stage("moving into place")
        manifest = output.Manifest(
            request=wanted,
            files=output.describe(folder),
            documents=totals.documents,
            sequences=totals.sequences,
            tokens=totals.tokens,
            text_bytes=totals.text_bytes,
            bytes_per_token=round(totals.text_bytes / totals.tokens, 4),
            vocab_size=vocab_size,
            eod=eod,
            empty=totals.empty,
            replaced=dict(totals.replaced),
            skipped=catalogue.skipped,
            seconds=round(time.monotonic() - started, 1),
            command=shlex.join(["megatron-moe", *sys.argv[1:]]),
        )
        output.publish(folder, request.prefix, manifest)
    return manifest, False


def _check(request: Request) -> None:
    if not request.prefix.name:
        raise DataError(
            f"--out ({request.prefix}) names no file; give a prefix such as data/corpus"
        )
    if request.prefix.suffix in {".bin", ".idx"}:
        raise DataError(
            f"--out ({request.prefix}) takes a prefix; leave out {request.prefix.suffix}"
        )
    if request.tokenizer == "bpe" and request.vocab_size < tokenizer.SMALLEST_VOCABULARY:
        raise DataError(
            f"--vocab-size ({request.vocab_size}) must be at least "
            f"{tokenizer.SMALLEST_VOCABULARY}: 256 bytes and the end-of-document token"
        )
    if request.limit_mb is not None and request.limit_mb <= 0:
        raise DataError(f"--limit-mb ({request.limit_mb:g}) must be above 0")


def _content(request: Request, catalogue: Catalogue) -> dict[str, str | int | float | None]:
    """Return all that the content depends on, for a later run to compare."""
    choice = request.tokenizer
    if choice not in ("bpe", "byte"):
        file = tokenizer.find(choice) / "tokenizer.json"
        choice = f"sha256:{output.sha256(file)}"
    return {
        "tokenizer": choice,
        "vocab_size": request.vocab_size if choice == "bpe" else None,
        "json_key": request.json_key,
        "limit_mb": request.limit_mb,
        "inputs": catalogue.digest(),
    }


def _write(
    request: Request, catalogue: Catalogue, folder: Path, progress: Progress
) -> tuple[Totals, int, int]:
    """Write ``bin``, ``idx`` and ``tokenizer`` into ``folder``; return sums, vocabulary, EOD."""
    trial, encoding = _choose_tokenizer(request, catalogue, folder / "tokenizer", progress)
    progress.stage("starting Megatron's writer")
    todo = batches(catalogue.sources, request.limit)
    with closing(encode_all(todo, encoding, request.workers)) as stream:
        # The workers run ahead from the first result on, while Megatron is imported here.
        head = _until_text(stream)
        if not any(part.ids.size for part in head):
            raise DataError(
                f"no text in the input: {len(catalogue.sources)} file(s) read, all of them empty"
            )
        vocab_size = _vocabulary(request, folder / "tokenizer", encoding.eod, trial)
        progress.stage("encoding")
        progress.begin(min(catalogue.size, request.limit or catalogue.size))
        totals = _build(folder, vocab_size, chain(head, stream), progress)
    return totals, vocab_size, encoding.eod


def _vocabulary(request: Request, folder: Path, eod: int, trial: list[str]) -> int:
    """Return Megatron's vocabulary size; try a tokenizer that is not ours in its class first."""
    with _quiet():
        import megatron.core.datasets.indexed_dataset  # noqa: F401  noisy, so not in _build

        if request.tokenizer in ("bpe", "byte"):
            return tokenizer.size(folder)
        return tokenizer.check_with_megatron(folder, eod, trial)


def _until_text(stream: Iterator[Encoded]) -> list[Encoded]:
    head = []
    for encoded in stream:
        head.append(encoded)
        if encoded.ids.size:
            break
    return head


def _choose_tokenizer(
    request: Request, catalogue: Catalogue, folder: Path, progress: Progress
) -> tuple[list[str], Encoding]:
    text = tokenizer.sample(catalogue, request.json_key, request.limit)
    trial = [t[:_TRIAL_CHARACTERS] for t in islice(text, _TRIAL_TEXTS)]
    if request.tokenizer == "bpe":
        progress.stage(f"learning {request.vocab_size:,} tokens")
        text = tokenizer.sample(catalogue, request.json_key, request.limit)
        tokenizer.save(tokenizer.learn(text, request.vocab_size), folder)
    elif request.tokenizer == "byte":
        tokenizer.save(tokenizer.byte_tokenizer(), folder)
    else:
        tokenizer.copy(tokenizer.find(request.tokenizer), folder)
    contents = None if request.tokenizer == "byte" else (folder / "tokenizer.json").read_text()
    return trial, Encoding(contents, tokenizer.end_of_document(folder), request.json_key)


def _build(folder: Path, vocab_size: int, stream: Iterable[Encoded], progress: Progress) -> Totals:
    """Hand each sequence to Megatron's builder; close a document where one ends."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(vocab_size)
    builder: Any = IndexedDatasetBuilder(str(folder / "bin"), dtype=dtype)
    totals = Totals()
    with builder.data_file:  # closed whatever happens; finalize closes it too
        for encoded in stream:
            sequences = torch.from_numpy(encoded.ids).split(encoded.lengths)
            for sequence, ends in zip(sequences, encoded.ends, strict=True):
                builder.add_item(sequence)
                if ends:
                    builder.end_document()
            totals.add(encoded)
            progress.advance(encoded.consumed, encoded.ids.size)
    builder.finalize(str(folder / "idx"))
    return totals


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what Megatron's import says of absent GPU libraries: none is used here."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
