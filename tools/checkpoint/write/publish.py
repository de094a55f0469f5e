"""Make a finished folder the checkpoint, in one rename; the tracker follows last."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.plan.compile import Plan
from megatron_moe.tools.checkpoint.read.locate import TRACKER, folder_name

_SLACK = 1.01  # file system's own needs, beside the bytes themselves


def unfinished(out: Path, plan: Plan) -> Path:
    """Return the folder in which a plan's output grows; a name that Megatron never reads."""
    name = folder_name(plan.source.location.iteration)
    return out / f".unfinished-{name}"


def check_place(out: Path, plan: Plan, *, force: bool) -> None:
    """Refuse to overwrite anything, or to start what cannot end.

    Raises:
        CheckpointError: The target exists or is the source, cannot be written, or has no room.
    """
    final = out / folder_name(plan.source.location.iteration)
    source = plan.source.folder.resolve()
    if out.resolve() in (source, source.parent) or final.resolve() == source:
        raise CheckpointError(f"{out}: is the source itself; give another folder")
    if final.exists() and not force:
        raise CheckpointError(f"{final}: exists already; pass --force to replace it")
    parent = next(p for p in (out, *out.parents) if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        raise CheckpointError(f"{parent}: cannot be written to; choose another OUT")
    need, free = int(plan.write_bytes * _SLACK), shutil.disk_usage(parent).free
    if need > free:
        raise CheckpointError(
            f"{parent}: {need:,} bytes are needed, {free:,} are free; make room, or choose "
            "another OUT"
        )


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_forced(path: Path, content: bytes) -> None:
    """Write a small file and force it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def publish(folder: Path, out: Path, iteration: int | str) -> Path:
    """Rename the finished folder into place, then point the tracker at it.

    Returns:
        The new checkpoint's folder.
    """
    final = out / folder_name(iteration)
    for inner in sorted(p for p in folder.rglob("*") if p.is_dir()):
        sync_folder(inner)
    sync_folder(folder)
    replaced = out / f".replaced-{final.name}"
    if final.exists():  # only with --force
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    folder.rename(final)
    point_at(out, iteration)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def point_at(out: Path, iteration: int | str) -> None:
    """Let the tracker name an iteration whose folder is in place."""
    sync_folder(out)
    new = out / f".{TRACKER}.new"
    write_forced(new, str(iteration).encode())
    new.replace(out / TRACKER)
    sync_folder(out)
