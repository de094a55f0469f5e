"""How far the work is: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_SECONDS_BETWEEN_LINES = 5.0


class Progress(Protocol):
    """What `prepare` tells of its work."""

    def stage(self, what: str) -> None:
        """Say what is being done now."""

    def begin(self, total: int) -> None:
        """Start the long part, of ``total`` bytes on disk."""

    def advance(self, consumed: int, tokens: int) -> None:
        """Tell that ``consumed`` more bytes became ``tokens`` more tokens."""


class Plain:
    """One line a stage, and one every few seconds of the long part, to standard error."""

    def __init__(self) -> None:
        self._total = self._done = self._tokens = 0
        self._started = self._last = 0.0

    def stage(self, what: str) -> None:
        """Print the stage."""
        print(what, file=sys.stderr, flush=True)

    def begin(self, total: int) -> None:
        """Start the clock."""
        self._total = total
        self._started = self._last = time.monotonic()

    def advance(self, consumed: int, tokens: int) -> None:
        """Print a line if the last one is some seconds old."""
        self._done += consumed
        self._tokens += tokens
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES and self._done < self._total:
            return
        self._last = now
        rate = self._done / max(now - self._started, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        self.stage(
            f"  {self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB, {self._tokens:,} tokens, "
            f"{rate / 1e6:.1f} MB/s, {left:.0f} s left"
        )


class Bar:
    """A rich progress bar with rate and time left."""

    def __init__(self) -> None:
        from rich import progress as rich
        from rich.console import Console

        self._tokens = 0
        self.rich = rich.Progress(
            rich.SpinnerColumn(),
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.DownloadColumn(),
            rich.TransferSpeedColumn(),
            rich.TimeRemainingColumn(),
            rich.TextColumn("{task.fields[tokens]}"),
            console=Console(stderr=True),
        )
        self._task = self.rich.add_task("starting", total=None, tokens="")

    def stage(self, what: str) -> None:
        """Show the stage before the bar."""
        self.rich.update(self._task, description=what)

    def begin(self, total: int) -> None:
        """Let the bar run from here."""
        self.rich.reset(self._task, total=total, tokens="")

    def advance(self, consumed: int, tokens: int) -> None:
        """Move the bar."""
        self._tokens += tokens
        self.rich.update(self._task, advance=consumed, tokens=f"{self._tokens:,} tokens")


@contextmanager
def shown(style: str) -> Iterator[Progress]:
    """Give the display that ``style`` names: ``bar``, ``plain``, or ``auto`` by the terminal."""
    if style == "plain" or (style == "auto" and not sys.stderr.isatty()):
        yield Plain()
        return
    bar = Bar()
    with bar.rich:
        yield bar
