"""Find the iteration to read, and tell its format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_moe.tools.checkpoint.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True, slots=True)
class Location:
    """One checkpoint on disk.

    Args:
        folder: Holds its files.
        iteration: Number, or ``release``.
        form: ``torch`` or ``torch_dist``.
    """

    folder: Path
    iteration: int | str
    form: str


def folder_name(iteration: int | str) -> str:
    """Return Megatron's folder name of an iteration."""
    return "release" if iteration == "release" else f"iter_{int(iteration):07d}"


def locate(path: Path, iteration: int | None = None) -> Location:
    """Find a checkpoint.

    Args:
        path: A folder that Megatron saved to (with a tracker), or one iteration's folder.
        iteration: Which to take; the tracker's when None.

    Raises:
        CheckpointError: There is none, or its format cannot be read.
    """
    path = path.absolute()
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give the folder passed to --save")
    tracker = path / TRACKER
    if iteration is None and not tracker.is_file():
        if (path / "metadata.json").exists() or any(path.glob("mp_rank_*")):
            return Location(path, _number(path), _form(path))
        if (path / ".metadata").exists() or any(path.glob("*.distcp")):
            _form(path)
        found = sorted(p.name for p in path.glob("iter_*"))
        hint = "; give the folder passed to --save"
        if found:
            hint = f"; it has {', '.join(found[-3:])}: pass --iteration"
        raise CheckpointError(f"{path}: neither {TRACKER} nor a checkpoint's files are here{hint}")
    chosen: int | str = iteration if iteration is not None else _tracked(tracker)
    folder = path / folder_name(chosen)
    if not folder.is_dir():
        there = ", ".join(sorted(p.name for p in path.glob("iter_*"))[-3:]) or "no iteration"
        source = f"{TRACKER} names" if iteration is None else "--iteration asks for"
        raise CheckpointError(
            f"{path}: {source} {folder.name}, which does not exist; there is {there}. "
            "Pass --iteration with one that exists"
        )
    return Location(folder, chosen, _form(folder))


def _tracked(tracker: Path) -> int | str:
    text = tracker.read_text(errors="replace").strip()
    if text == "release":
        return text
    if not text.isdecimal():
        raise CheckpointError(
            f"{tracker}: holds {text[:40]!r}, neither a number nor 'release'; pass --iteration"
        )
    return int(text)


def _number(folder: Path) -> int | str:
    digits = folder.name.removeprefix("iter_")
    return int(digits) if digits.isdecimal() else "release"


def _form(folder: Path) -> str:
    if (folder / "metadata.json").exists():
        import json

        try:
            said = json.loads((folder / "metadata.json").read_text())
        except ValueError as fault:
            raise CheckpointError(f"{folder / 'metadata.json'}: not JSON: {fault}") from fault
        if not isinstance(said, dict):
            raise CheckpointError(f"{folder / 'metadata.json'}: not a JSON object")
        backend = said.get("sharded_backend")
        if backend != "torch_dist":
            raise CheckpointError(
                f"{folder}: format {backend!r} is not read. zarr ended with Megatron 0.15: load it "
                "there and save with --ckpt-format torch_dist"
            )
        if not (folder / ".metadata").is_file():
            raise CheckpointError(
                f"{folder}: has metadata.json but no .metadata: the save did not finish, or an "
                "asynchronous one is still running. Take an earlier iteration"
            )
        return "torch_dist"
    if any(folder.glob("mp_rank_*")):
        return "torch"
    if any(folder.glob("**/.zarray")):
        raise CheckpointError(
            f"{folder}: zarr is not read: load it with Megatron 0.15 and save as torch_dist"
        )
    if (folder / ".metadata").exists():
        raise CheckpointError(
            f"{folder}: .metadata without metadata.json: torch_dcp, fsdp_dtensor, or a torch_dist "
            "save that is still being written. The first two are not read: save with "
            "--ckpt-format torch_dist"
        )
    if any(folder.glob("*.distcp")):
        raise CheckpointError(
            f"{folder}: .distcp files without .metadata: the save did not finish. Take an earlier "
            "iteration"
        )
    raise CheckpointError(f"{folder}: holds no checkpoint that can be read (torch, torch_dist)")
