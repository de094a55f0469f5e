"""Run a command, keep every line it writes, and never leave it running behind."""

import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_KEPT_LINES = 400
_SHOWN_LINES = 25
# torch's launcher follows a worker's traceback with a long one of its own, which tells nothing.
_ERROR = re.compile(r"^(\[\w+\]: ?)?[\w.]*(?<!ChildFailed)(Error|Exception): ")
_GRACE_SECONDS = 40  # torch's launcher itself gives its workers 30


class ChildError(Exception):
    """A command ended badly; the message holds the end of its log and where the rest is."""


def run(command: Sequence[str], log: Path, on_line: Callable[[str], None]) -> None:
    """Run ``command`` to its end.

    Args:
        command: Program and arguments.
        log: Where every line goes; overwritten.
        on_line: Called with each line as it comes.

    Raises:
        ChildError: The exit status is not 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    with log.open("w") as file, _started(command) as child:
        assert child.stdout is not None
        for line in child.stdout:
            file.write(line)
            file.flush()
            last.append(line)
            on_line(line)
        status = child.wait()
    if status != 0:
        raise ChildError(
            f"{''.join(telling_lines(list(last)))}\n`{Path(command[0]).name} {command[1]}` ended "
            f"with status {status}; the lines above are from {log}"
        )


def telling_lines(lines: list[str]) -> list[str]:
    """Give the lines that end with the last error a worker raised; without one, the last lines."""
    errors = [place for place, line in enumerate(lines) if _ERROR.match(line)]
    end = errors[-1] + 1 if errors else len(lines)
    return lines[max(0, end - _SHOWN_LINES) : end]


@contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    # In a session of its own, Ctrl-C reaches this process alone, and we end the whole family.
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        with termination_as_interrupt():
            yield child
    finally:
        _end(child)


def _end(child: subprocess.Popen[str]) -> None:
    """Stop the launcher, which stops its workers, unless it has ended well already."""
    if child.poll() == 0:
        return
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_SECONDS)


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Let `kill` end a command as Ctrl-C does: through the clean-up."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
