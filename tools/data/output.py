"""The files of one dataset, and the rule that nothing unfinished looks finished.

All is written in ``PREFIX.partial/`` and moved into place at the end, the manifest ``PREFIX.json``
last: a dataset is complete when its manifest is there and the sizes agree with it. A lock that
the system drops with the process tells a run that was killed from one still at work.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_moe.tools.data.sources import DataError

_MAKER = "megatron-moe data"
_VALIDATION_PERCENT = 2


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What PREFIX.json says of the dataset beside it.

    Args:
        request: The inputs' digest and the options that the content depends on.
        files: By what follows ``PREFIX.`` in a file's name, its ``bytes`` and ``sha256``.
        documents: Number of documents.
        sequences: Number of sequences; more than documents where large files were cut.
        tokens: Number of token ids, end-of-document ones included.
        text_bytes: Bytes of UTF-8 text.
        bytes_per_token: Their ratio.
        vocab_size: Megatron's vocabulary size, before its padding.
        eod: Id of the end-of-document token.
        empty: Documents without text, left out.
        replaced: By file, undecodable places that became U+FFFD.
        skipped: Files of an input folder that were left out, with the reason.
        seconds: Time it took.
        command: The command line.
        maker: Marks the file as ours.
    """

    request: dict[str, str | int | float | None]
    files: dict[str, dict[str, int | str]]
    documents: int
    sequences: int
    tokens: int
    text_bytes: int
    bytes_per_token: float
    vocab_size: int
    eod: int
    empty: int
    replaced: dict[str, int]
    skipped: dict[str, str]
    seconds: float
    command: str
    maker: str = _MAKER


def beside(prefix: Path, ending: str) -> Path:
    """Return ``PREFIX.ending``; the prefix may hold dots of its own."""
    return prefix.parent / f"{prefix.name}.{ending}"


def read_manifest(prefix: Path) -> Manifest:
    """Return the manifest of a complete dataset.

    Raises:
        DataError: There is none, or the files are not those it describes.
    """
    path = beside(prefix, "json")
    if not path.is_file():
        raise DataError(f"no dataset at {prefix}: {path.name} is missing; run megatron-moe data")
    manifest = _parse(path)
    for name, facts in manifest.files.items():
        file = beside(prefix, name)
        size = file.stat().st_size if file.is_file() else None
        if size != facts["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise DataError(
                f"{file} {found}, {path.name} says {facts['bytes']:,}: the dataset is damaged; "
                "pass --force to write it again"
            )
    return manifest


def _parse(path: Path) -> Manifest:
    try:
        value = json.loads(path.read_bytes())
        if value["maker"] == _MAKER:
            return Manifest(**value)
    except (ValueError, TypeError, KeyError):
        pass  # whatever it is, it is none of ours: one message says so
    raise DataError(f"{path} is not a manifest of {_MAKER}; choose another --out")


def flags(prefix: str | Path) -> list[str]:
    """Return Megatron's flags that train on the dataset at ``prefix``.

    The validation part is 2 % of the sequences, or one sequence where 2 % would be less.

    Raises:
        DataError: There is no complete dataset.
    """
    prefix = Path(prefix)
    percent = validation_percent(read_manifest(prefix).sequences)
    return [
        *("--data-path", str(prefix)),
        *("--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", str(beside(prefix, "tokenizer"))),
        *("--make-vocab-size-divisible-by", "128"),
        *("--split", f"{100 - percent},{percent},0"),
    ]


def validation_percent(sequences: int) -> int:
    """Return the whole percentage of sequences to validate on; 0 with one sequence only."""
    if sequences < 2:
        return 0
    return max(_VALIDATION_PERCENT, -(-100 // sequences))


def is_current(prefix: Path, request: dict[str, str | int | float | None], force: bool) -> bool:
    """Return whether the dataset that ``request`` describes is there already.

    Raises:
        DataError: Something else is there, and ``force`` does not allow replacing it.
    """
    manifest = beside(prefix, "json")
    if prefix.is_dir() and not manifest.exists() and not (prefix / "cache").is_dir():
        raise DataError(
            f"--out ({prefix}) is a folder; give a prefix in it, such as {prefix / 'corpus'}"
        )
    if manifest.exists():
        _parse(manifest)  # --force replaces a dataset, never a stranger's file
    if force:
        return False
    if not manifest.exists():
        for ending in ("bin", "idx", "tokenizer"):
            if beside(prefix, ending).exists():
                raise DataError(
                    f"{beside(prefix, ending)} is there without {manifest.name}: half-written, or "
                    "not made by this command; pass --force to replace it, or choose another --out"
                )
        return False
    held = read_manifest(prefix).request
    for key, value in request.items():
        if held.get(key) != value:
            what = "other inputs" if key == "inputs" else f"{key} {held.get(key)}, not {value}"
            raise DataError(
                f"{prefix} was made with {what}; pass --force to replace it, "
                "or choose another --out"
            )
    return True


@contextmanager
def partial(prefix: Path) -> Iterator[Path]:
    """Hold ``PREFIX.partial/``, an empty folder of this process's own, removed at the end.

    Raises:
        DataError: Another process holds it.
    """
    folder = beside(prefix, "partial")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"another process is writing {prefix} ({folder.name} is locked); "
                "wait for it, or choose another --out"
            ) from error
        for left in folder.iterdir():  # of a run that was killed
            if left.name != "lock":
                _remove(left)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def publish(folder: Path, prefix: Path, manifest: Manifest) -> None:
    """Move ``folder``'s ``bin``, ``idx`` and ``tokenizer`` to ``prefix``, the manifest last.

    At no moment does a ``.idx`` stand beside a ``.bin`` that it does not describe.
    """
    (folder / "json").write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    for path in folder.rglob("*"):
        _sync(path)
    for ending in ("json", "idx", "tokenizer", "bin"):
        _remove(beside(prefix, ending))
    # Megatron keeps its shuffled indices in PREFIX/cache and would take the old data's for new.
    _remove(prefix / "cache" / "GPTDataset_indices")
    for ending in ("bin", "tokenizer", "idx"):
        (folder / ending).rename(beside(prefix, ending))
    _sync(prefix.parent)
    (folder / "json").rename(beside(prefix, "json"))
    _sync(prefix.parent)


def describe(folder: Path) -> dict[str, dict[str, int | str]]:
    """Return size and SHA-256 of each file to be published, by what follows ``PREFIX.``."""
    facts: dict[str, dict[str, int | str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "lock":
            name = path.relative_to(folder).as_posix()
            facts[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return facts


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
