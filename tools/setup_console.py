"""Run a command so that its output is both seen and kept: used by the setup script.

Standard library only, Python >= 3.9. On a terminal the command gets a terminal too (a pseudo one),
so that it draws its own progress bars; a copy without control codes goes to the log.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

CONTROL_CODES = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]|[^\n]*\r(?!\n)|\r(?=\n)")


class SetupError(Exception):
    """Setting up cannot go on; the message is for the user."""


class Log:
    """A log file beside the terminal.

    Args:
        path: The file; an earlier one is overwritten.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        self.path = path

    def say(self, line: str) -> None:
        """Tell the user one line."""
        print(line, flush=True)
        self._keep(f"{line}\n".encode())

    def run(self, command: list[str], env: Mapping[str, str] | None = None) -> int:
        """Run ``command`` to its end and return its exit status."""
        self._keep(f"$ {' '.join(command)}\n".encode())
        source, sink = _pseudo_terminal() if sys.stdout.isatty() else os.pipe()
        try:
            child = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
            )
        except OSError as fault:
            self.say(f"{command[0]}: {fault.strerror}")
            os.close(source)
            return 127
        finally:
            os.close(sink)
        try:
            for chunk in _chunks(source):
                sys.stdout.buffer.write(chunk)
                sys.stdout.flush()
                self._keep(CONTROL_CODES.sub(b"", chunk))
            return child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
        finally:
            os.close(source)

    def _keep(self, content: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(content)


def _chunks(source: int) -> Iterator[bytes]:
    # A pseudo terminal reports its closing as an input/output error, a pipe as an empty read.
    with contextlib.suppress(OSError):
        while chunk := os.read(source, 65536):
            yield chunk


def _pseudo_terminal() -> tuple[int, int]:
    import fcntl
    import termios

    source, sink = os.openpty()
    size = shutil.get_terminal_size()
    fcntl.ioctl(sink, termios.TIOCSWINSZ, struct.pack("HHHH", size.lines, size.columns, 0, 0))
    return source, sink
