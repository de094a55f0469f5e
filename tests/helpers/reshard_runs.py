"""Runs of ``reshard`` in processes of their own, to be disturbed, and what they leave behind."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import xxhash

from megatron_moe.tools.checkpoint.read.open import open_checkpoint
from megatron_moe.tools.checkpoint.write import execute as executor

FINAL, TRACKER = "iter_0000007", "latest_checkpointed_iteration.txt"
UNFINISHED = f".unfinished-{FINAL}"
TO = ["--tp", "1", "--pp", "2", "--ep", "4", "--etp", "1", "--dp", "4", "--format", "torch"]
WISHES = {"tp": 1, "pp": 2, "ep": 4, "etp": 1, "dp": 4, "form": "torch"}


def contents(out: Path) -> dict[str, str]:
    """Checksums of all files of an output, which must be all there is."""
    assert {p.name for p in out.iterdir()} == {FINAL, TRACKER}
    assert (out / TRACKER).read_text() == "7"
    return {
        str(path.relative_to(out)): xxhash.xxh3_64_hexdigest(path.read_bytes())
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


class Running:
    """The command in a process of its own, with batches of 1 MB, each forced to disk."""

    def __init__(self, source: Path, out: Path, *more: str, workers: int = 2) -> None:
        self.out, self.log = out, out.with_name(f"{out.name}.log")
        line = ["reshard", str(source), str(out), *TO, "--workers", str(workers), *more]
        self.pid = os.fork()
        if self.pid == 0:
            self._become(line)

    def _become(self, line: list[str]) -> None:
        code = 70
        try:
            with self.log.open("wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
            executor._BATCH, executor._FLUSH_S = 1 << 20, 0.0
            from megatron_moe.cli import main

            main(line, standalone_mode=False)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 71
        finally:
            sys.stdout.flush()
            os._exit(code)

    def at_work(self) -> None:
        """Wait until it has begun to write."""
        until(lambda: any(p.exists() for p in (self.out / UNFINISHED, self.out / FINAL)))

    def workers(self) -> list[int]:
        try:
            return [int(n) for n in children_of(self.pid).split()]
        except OSError:
            return []

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def said(self) -> str:
        return self.log.read_text()


def children_of(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.002)


def is_running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def nothing_half_done(out: Path) -> None:
    """A reader finds a whole checkpoint or none."""
    if (out / TRACKER).exists():
        assert (out / FINAL).is_dir()
    if (out / FINAL).exists():
        open_checkpoint(out / FINAL)
        assert not (out / UNFINISHED).exists()


class DiskFull:
    """Lets so many writes pass, then has no room."""

    def __init__(self, writes: int) -> None:
        self.left, self.write = writes, os.pwrite

    def __call__(self, fd: int, data: bytes, offset: int) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.write(fd, data, offset)
