"""Which files are read, and in what order.

The order is that of a hash of each file's name: the same on every machine and for any number of
workers, and unrelated to folders, so that Megatron's ``--split``, which cuts the dataset into
consecutive ranges, does not put one package in training and another in validation.
"""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Of the standard library: packages that are not part of it, and tests written in other encodings.
_NOT_STDLIB = {"site-packages", "dist-packages", "encoded_modules"}
_SNIFFED = 8192


class DataError(ValueError):
    """A fault in the text, the options or the output that the user can put right."""


@dataclass(frozen=True)
class Source:
    """One file to read.

    Args:
        path: Where it is.
        name: What it is called in messages and in the order's hash.
        kind: ``text``, ``jsonl`` or ``jsonl.gz``.
        size: Bytes on disk.
        mtime_ns: Time of the last change, nanoseconds.
    """

    path: Path
    name: str
    kind: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Catalogue:
    """The files to read, in their order, and those left out with the reason."""

    sources: tuple[Source, ...]
    skipped: dict[str, str]

    @property
    def size(self) -> int:
        """Bytes on disk of all files together."""
        return sum(source.size for source in self.sources)

    def digest(self) -> str:
        """Hash of names, sizes and times: what "the same inputs" means for a re-run."""
        lines = sorted(f"{s.name}\0{s.kind}\0{s.size}\0{s.mtime_ns}" for s in self.sources)
        return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def find_sources(inputs: Sequence[Path], prefix: Path) -> Catalogue:
    """Return the files behind ``inputs``; with none given, Python's own standard library.

    Args:
        inputs: Files and folders; a folder is searched for text, hidden names left out.
        prefix: The output's prefix, whose files are not input even where they lie in a folder.

    Raises:
        DataError: An input is missing, is of a kind that is not read, or holds no text.
    """
    found: list[Source] = []
    skipped: dict[str, str] = {}
    for path in inputs:
        if not path.exists():
            raise DataError(
                f"INPUT ({path}) does not exist; "
                "give a text file, a .jsonl, a .jsonl.gz or a folder"
            )
        if not path.is_dir():
            found.append(_source(path, str(path)))
            continue
        before = len(found)
        for file, name in _files(path, prefix):
            try:
                found.append(_source(file, name))
            except DataError as error:
                skipped[name] = str(error).removeprefix(f"{name} ")
        if len(found) == before:
            raise DataError(f"INPUT ({path}) holds no text file{_examples(skipped)}")
    if not inputs:
        found = [_source(file, name) for file, name in _standard_library()]
    found.sort(key=lambda s: hashlib.sha256(s.name.encode(errors="surrogateescape")).digest())
    return Catalogue(tuple(found), skipped)


def _files(folder: Path, prefix: Path) -> Iterator[tuple[Path, str]]:
    own = prefix.resolve()
    base = folder.resolve()
    for here, folders, files in base.walk(on_error=_refuse):
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__pycache__")) and not _is_output(here / name, own)
        ]
        for name in files:
            file = here / name
            if not name.startswith(".") and file.is_file() and not _is_output(file, own):
                yield file, f"{base.name}/{file.relative_to(base).as_posix()}"


def _is_output(path: Path, prefix: Path) -> bool:
    # PREFIX itself is the folder in which Megatron keeps its indices of the dataset.
    names = {f"{prefix.name}.{end}" for end in ("bin", "idx", "json", "tokenizer", "partial")}
    return path.parent == prefix.parent and (path.name in names or path == prefix)


def _refuse(error: OSError) -> None:
    raise error


def _standard_library() -> Iterator[tuple[Path, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for here, folders, files in root.walk(on_error=_refuse):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]
        for name in files:
            # badsyntax_*: tests of the parser, undecodable on purpose.
            if name.endswith(".py") and not name.startswith("badsyntax_"):
                yield here / name, (here / name).relative_to(root).as_posix()


def _source(path: Path, name: str) -> Source:
    kind = _kind(path, name)
    stat = path.stat()
    return Source(path, name, kind, stat.st_size, stat.st_mtime_ns)


def _kind(path: Path, name: str) -> str:
    lower = path.name.lower()
    if lower.endswith(".jsonl.gz"):
        return "jsonl.gz"
    if lower.endswith(".jsonl"):
        return "jsonl"
    if lower.endswith(".gz"):
        raise DataError(f"{name} is compressed; only .jsonl.gz is read so, unpack it first")
    if lower.endswith(".json"):
        raise DataError(
            f"{name} is one JSON value; write one object a line and name the file .jsonl"
        )
    with path.open("rb") as file:
        head = file.read(_SNIFFED)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name} is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8")
    if b"\0" in head:
        raise DataError(f"{name} is not text (it holds zero bytes); give text, .jsonl or .jsonl.gz")
    return "text"


def _examples(skipped: dict[str, str], most: int = 2) -> str:
    if not skipped:
        return ""
    shown = "; ".join(f"{name} {reason}" for name, reason in list(skipped.items())[:most])
    return f" ({len(skipped)} left out: {shown}{'; …' if len(skipped) > most else ''})"
