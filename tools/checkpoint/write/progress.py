"""How far a run is: a bar for people, lines of JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Told of every batch."""

    def advance(self, nbytes: int) -> None:
        """Count bytes done."""


class _Lines:
    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.monotonic()

    def advance(self, nbytes: int) -> None:
        self.done += nbytes
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = self.done / seconds
        left = (self.total - self.done) / rate if rate else None
        line = {
            "done_bytes": self.done,
            "total_bytes": self.total,
            "bytes_per_s": round(rate),
            "eta_s": None if left is None else round(left, 1),
        }
        print(json.dumps(line), file=sys.stderr, flush=True)


class _Silent:
    def advance(self, nbytes: int) -> None:
        pass


@contextmanager
def shown(kind: str, total: int) -> Iterator[Progress]:
    """Show progress while the block runs.

    Args:
        kind: ``bar``, ``json`` or ``none``.
        total: Bytes of the whole run.
    """
    if kind == "json":
        yield _Lines(total)
    elif kind == "none" or not sys.stderr.isatty():
        yield _Silent()
    else:
        with _bar(total) as bar:
            yield bar


@contextmanager
def _bar(total: int) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as RichProgress

    columns = [
        TextColumn("resharding"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    ]
    with RichProgress(*columns, console=Console(stderr=True)) as display:
        task = display.add_task("", total=total)

        class Bar:
            def advance(self, nbytes: int) -> None:
                display.advance(task, nbytes)

        yield Bar()
