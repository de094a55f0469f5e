"""What a command costs: wall and CPU time, private memory of its processes, bytes it moves."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_INTERVAL_S = 0.05  # between looks at the memory
_MEMORY = re.compile(rb"^Pss_(?:Anon|Shmem): +(\d+) kB", re.MULTILINE)


@dataclass(frozen=True)
class Cost:
    """Of one run of a command, its children included.

    Args:
        seconds: Wall time.
        cpu: User and system seconds.
        private: Peak of the anonymous and shared memory of all its processes, bytes. A page that
            forked processes share counts once; pages of files do not count.
        read: Bytes asked of files, cached or not.
        written: Bytes given to files.
        output: What it printed.
    """

    seconds: float
    cpu: float
    private: int
    read: int
    written: int
    output: str


class _Memory(threading.Thread):
    """Follows the memory of a process and its descendants."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.done = pid, 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(_INTERVAL_S):
            self.peak = max(self.peak, sum(map(_private, _tree(self.pid))))


def _tree(pid: int) -> Iterable[int]:
    children: dict[int, list[int]] = defaultdict(list)
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                text = Path(entry.path, "stat").read_text()
            except OSError:
                continue  # it has ended
            children[int(text.rpartition(")")[2].split()[1])].append(int(entry.name))
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        yield one
        waiting += children[one]


def _private(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_bytes()
    except OSError:
        return 0  # it has ended
    return sum(int(kilobytes) for kilobytes in _MEMORY.findall(text)) << 10


def watch(command: Sequence[str], env: dict[str, str] | None = None) -> Cost:
    """Run a command to its end.

    Raises:
        RuntimeError: It failed; with the last lines it printed.
    """
    with tempfile.TemporaryFile() as log:
        begin = time.perf_counter()
        child = subprocess.Popen(
            command, env=os.environ | (env or {}), stdout=log, stderr=subprocess.STDOUT
        )
        memory = _Memory(child.pid)
        memory.start()
        try:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            seconds = time.perf_counter() - begin
            # Until it is reaped, its counters stand, those of its children added.
            moved = dict(
                line.split(": ") for line in Path(f"/proc/{child.pid}/io").read_text().splitlines()
            )
        except BaseException:
            child.kill()
            child.wait()
            raise
        finally:
            memory.done.set()
            memory.join()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read().decode(errors="replace")
    if child.returncode:
        last = "\n".join(output.splitlines()[-25:])
        raise RuntimeError(f"{' '.join(command)} failed ({child.returncode}):\n{last}")
    return Cost(
        seconds, usage.ru_utime + usage.ru_stime, memory.peak,
        int(moved["rchar"]), int(moved["wchar"]), output,
    )  # fmt: skip


def cool(folder: Path) -> None:
    """Drop a folder's files from the page cache, after forcing them to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
