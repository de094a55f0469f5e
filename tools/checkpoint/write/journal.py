"""The journal of a run: which batches are on disk, so that an interrupted run can go on."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.stored.records import Piece
from megatron_moe.tools.checkpoint.write.worker import Done

NAME = "reshard_journal.jsonl"


class Journal:
    """Finished batches, each line written after their bytes were forced to disk.

    Whoever holds it has the folder to itself, until it is closed.

    Args:
        folder: Of the unfinished checkpoint.

    Raises:
        CheckpointError: Another process is at work there.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.done: dict[int, Done] = {}
        self._file = self.path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            raise CheckpointError(
                f"{folder}: another process is writing it; wait for it"
            ) from fault

    def begin(self, identity: str, *, resume: bool) -> None:
        """Start, or go on from what is noted.

        Args:
            identity: Digest of the plan that is carried out.
            resume: Whether to go on.

        Raises:
            CheckpointError: What is noted belongs to another plan.
        """
        if resume:
            self._read(identity)
        if not self.done:
            self._file.truncate(0)
            self._line({"plan": identity})
            self.force()

    def _read(self, identity: str) -> None:
        self._file.seek(0)
        lines = self._file.read().splitlines()
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:
                break  # the line that was being written
        if not entries:
            return
        if entries[0].get("plan") != identity:
            raise CheckpointError(
                f"{self.path}: belongs to another plan (source or options have changed since); "
                "pass --force to start over"
            )
        for entry in entries[1:]:
            done = Done(entry["batch"], entry["nbytes"])
            done.digests = {int(number): digest for number, digest in entry["digests"].items()}
            done.read = [Piece(*piece) for piece in entry["read"]]
            done.written = [Piece(*piece) for piece in entry["written"]]
            done.scattered = set(entry["scattered"])
            self.done[done.batch] = done
        # Drop a torn last line, so that what follows it can be read.
        whole = "".join(f"{json.dumps(entry)}\n" for entry in entries)
        self._file.truncate(0)
        self._file.write(whole)
        self.force()

    def _line(self, entry: dict) -> None:
        self._file.write(json.dumps(entry) + "\n")

    def add(self, finished: list[Done]) -> None:
        """Note batches whose bytes are on disk."""
        for done in finished:
            entry = vars(done) | {"scattered": sorted(done.scattered)}
            self._line(entry)
            self.done[done.batch] = done
        self.force()

    def force(self) -> None:
        """Force the journal itself to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """End of the run: the journal goes."""
        self.path.unlink()
        self._file.close()

    def close(self) -> None:
        """Leave the journal for a later ``--resume``."""
        self._file.close()
