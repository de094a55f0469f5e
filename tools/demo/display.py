"""Show a run as it goes: a live bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from megatron_moe.tools.demo.megatron_log import History, Step, Validation, parse

_SECONDS_BETWEEN_LINES = 10.0
_STARTING = "starting (imports, then the first step: about 20 s)"


class RunDisplay:
    """Reads a training run's log lines, keeps what they say, and shows where it stands.

    Args:
        console: Where to write.
        title: Name of the run.
        first: Iteration that the run starts after; 0 for a fresh one.
        last: Iteration that it ends with.
        tokens_per_step: For the rate.
        progress: The live bar, or None where there is no terminal.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        first: int,
        last: int,
        tokens_per_step: int,
        progress: Progress | None,
    ) -> None:
        self.history = History()
        self._console = console
        self._title = title
        self._first = first
        self._last = last
        self._tokens_per_step = tokens_per_step
        self._progress = progress
        self._told = time.monotonic()
        if progress is None:
            console.print(f"  {title}: {_STARTING}")
        else:
            self._task = progress.add_task(title, total=last - first, state=_STARTING)

    def line(self, line: str) -> None:
        """Take in one line of the run's output."""
        record = parse(line)
        if record is None:
            return
        self.history.add(record)
        if isinstance(record, Step):
            self._show(record)
        elif isinstance(record, Validation):
            # Megatron repeats the validation after the last step under another name.
            self._console.print(
                f"  {self._title}: iteration {record.iteration}, "
                f"validation loss [bold]{record.loss:.4f}[/bold]",
                highlight=False,
            )

    def _show(self, step: Step) -> None:
        rate = self._tokens_per_step / self.history.seconds_per_step()
        state = f"loss {step.loss:.3f}   {rate:,.0f} tokens/s"
        if self._progress is not None:
            done = step.iteration - self._first
            self._progress.update(self._task, completed=done, state=state)
        elif time.monotonic() - self._told > _SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            self._console.print(
                f"  {self._title}: iteration {step.iteration}/{self._last}   {state}",
                highlight=False,
            )


@contextmanager
def shown_run(
    console: Console, title: str, first: int, last: int, tokens_per_step: int
) -> Iterator[RunDisplay]:
    """Open a display for one run; arguments as :class:`RunDisplay`."""
    if not console.is_terminal:
        yield RunDisplay(console, title, first, last, tokens_per_step, None)
        return
    columns = (
        TextColumn("  "),
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield RunDisplay(console, title, first, last, tokens_per_step, progress)
