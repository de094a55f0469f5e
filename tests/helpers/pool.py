"""Persistent gloo workers: a distributed test costs milliseconds, not a start of Megatron.

    def sums(world, x):
        torch.distributed.all_reduce(x, group=world.group)
        return x

    def test_sums(pool):
        results = pool.run(sums, torch.ones(3), world_size=4)   # one result per rank

For each world size asked for, a team of that many workers is forked from one warm template process
(see `worker.py`) and kept for the session. A call that fails on any rank raises
:class:`RankError` with the tracebacks; a rank that does not come back is reported with its stack,
and its team is killed. Either way the next call gets a new team.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from helpers import wire

_GRACE_S = 2.0  # given to the other ranks after the first failure
_START_LIMIT_S = 400.0  # the import alone takes 15 s of CPU, minutes on a busy machine
_LOG_LINES = 25


class RankError(AssertionError):
    """A function run by the pool failed, hung or ended its process on some rank."""


@dataclass
class Statistics:
    """What the pool did in this session; times in seconds."""

    calls: int = 0
    in_calls: float = 0.0
    starting: float = 0.0
    teams: dict[int, int] = field(default_factory=dict)  # world size -> teams forked


@dataclass
class _Rank:
    rank: int
    connection: Connection
    pid: int
    folder: Path
    log_seen: int = 0

    def new_log(self) -> str:
        """Return the last lines that the worker printed since the last look."""
        path = self.folder / f"rank{self.rank}.log"
        data = path.read_bytes() if path.exists() else b""
        fresh, self.log_seen = data[self.log_seen :], len(data)
        lines = fresh.decode(errors="replace").splitlines()[-_LOG_LINES:]
        return "\n".join(line[:300] for line in lines)

    def stack(self) -> str:
        """Return what the worker's threads are doing now."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
        time.sleep(0.3)
        lines = (self.folder / f"rank{self.rank}.stack").read_text().splitlines()
        return "\n".join(line for line in lines if "torch/nn/modules/module.py" not in line)


class Pool:
    """Teams of gloo workers, by world size.

    Args:
        megatron: Whether the workers have Megatron imported and the CPU patches applied.
    """

    def __init__(self, *, megatron: bool = True) -> None:
        self.statistics = Statistics()
        self._megatron = megatron
        self._teams: dict[int, list[_Rank]] = {}
        self._template: subprocess.Popen | None = None
        self._ready = False
        self._broken = False
        self._store: Any = None

    def warm_up(self) -> None:
        """Start the template in the background; a call made later finds it warm."""
        if self._template is not None:
            return
        self._folder = Path(tempfile.mkdtemp(prefix="moe-pool-"))
        self._control, theirs = socket.socketpair()
        environ = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "TORCH_COMPILE_DISABLE": "1",
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        }
        code = "from helpers.worker import main; main()"
        kind = "megatron" if self._megatron else "torch"
        with (self._folder / "template.log").open("wb") as log:
            self._template = subprocess.Popen(
                [sys.executable, "-P", "-c", code, str(theirs.fileno()), kind],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ,
                start_new_session=True,  # Ctrl-C is for pytest; it closes the pool
            )
        theirs.close()

    def run(
        self,
        function: Callable,
        *args: Any,
        world_size: int = 2,
        timeout: float = 60.0,
        **kwargs: Any,
    ) -> list:
        """Call ``function(world, *args, **kwargs)`` on every rank of a team.

        Args:
            function: A top-level function of any test file or importable module.
            args: Positional arguments, the same on every rank; tensors go by value.
            world_size: Ranks of the team.
            timeout: Limit in seconds for the whole call, the start of a team not counted.
            kwargs: Keyword arguments of the function.

        Returns:
            The result of each rank, by rank; tensors detached and on the CPU.

        Raises:
            RankError: Some rank raised, hung or died; the message says which and where.
        """
        __tracebackhide__ = True
        address = wire.address_of(function)
        message = wire.pack(("call", address, wire.pack((args, kwargs))))
        team = self._team(world_size)
        start = time.perf_counter()
        self.statistics.calls += 1
        try:
            replies = self._exchange(team, message, timeout)
            failure = _describe(address.qualname, team, replies, timeout)
            if failure is None:
                for member in team:
                    member.connection.send_bytes(wire.pack(("reset",)))
                return [replies[rank][1] for rank in range(world_size)]
        except BaseException:
            self._kill(world_size)
            raise
        finally:
            self.statistics.in_calls += time.perf_counter() - start
        self._kill(world_size)
        raise RankError(failure)

    def close(self) -> None:
        """Kill all workers and the template."""
        if self._template is None:
            return
        for world_size in list(self._teams):
            self._kill(world_size)
        self._control.close()
        self._template.kill()
        self._template.wait()
        self._template, self._ready = None, False
        shutil.rmtree(self._folder, ignore_errors=True)

    def _exchange(self, team: list[_Rank], message: bytes, timeout: float) -> dict[int, tuple]:
        """Send the call and collect replies ``(kind, value, seconds)`` until all, or time is up."""
        for member in team:
            with suppress(BrokenPipeError):  # it died since the last call: seen below as EOF
                member.connection.send_bytes(message)
        replies: dict[int, tuple] = {}
        waiting = {member.connection: member for member in team}
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), left):
                member = waiting.pop(connection)
                try:
                    reply = wire.unpack(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    reply = ("died", "", 0.0)
                replies[member.rank] = reply
                if reply[0] != "ok":
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        return replies

    def _team(self, world_size: int) -> list[_Rank]:
        if world_size not in self._teams:
            start = time.perf_counter()
            self._wait_for_template()
            self._teams[world_size] = self._fork_team(world_size)
            self.statistics.starting += time.perf_counter() - start
        return self._teams[world_size]

    def _wait_for_template(self) -> None:
        if self._ready:
            return
        if self._broken:  # it would fail again, after as long
            raise RuntimeError("the pool did not start: see the first test that needed it")
        self.warm_up()
        self._control.settimeout(_START_LIMIT_S)
        try:
            answer = self._control.recv(16)
        except TimeoutError:
            answer = b""
        if answer != b"ready":
            log = (self._folder / "template.log").read_text(errors="replace")
            self.close()
            self._broken = True
            raise RuntimeError(f"the pool's template process did not start:\n{log[-4000:]}")
        self._ready = True

    def _fork_team(self, world_size: int) -> list[_Rank]:
        import torch.distributed as dist

        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        number = sum(self.statistics.teams.values())
        self.statistics.teams[world_size] = self.statistics.teams.get(world_size, 0) + 1
        folder = self._folder / f"team{number}of{world_size}"
        folder.mkdir()
        team = []
        for rank in range(world_size):
            ours, theirs = Pipe()
            order = {
                "rank": rank,
                "world_size": world_size,
                "port": self._store.port,
                "prefix": folder.name,
                "folder": str(folder),
            }
            socket.send_fds(self._control, [json.dumps(order).encode()], [theirs.fileno()])
            theirs.close()
            team.append(_Rank(rank, ours, int(self._control.recv(16)), folder))
        return team

    def _kill(self, world_size: int) -> None:
        for member in self._teams.pop(world_size, []):
            member.connection.close()
            with suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)


def _describe(
    name: str, team: list[_Rank], replies: dict[int, tuple], timeout: float
) -> str | None:
    """Return the report of a failed call, or None if every rank answered well."""
    logs = {member.rank: member.new_log() for member in team}
    parts: dict[str, list[int]] = {}  # the same text from several ranks is shown once
    for member in team:
        kind, value, _ = replies.get(member.rank, ("hung", "", 0.0))
        if kind == "error":
            parts.setdefault(value, []).append(member.rank)
        elif kind == "died":
            text = f"its process ended; last output:\n{logs[member.rank]}"
            parts.setdefault(text, []).append(member.rank)
    if not parts and len(replies) == len(team):
        return None
    hung = [member for member in team if member.rank not in replies]
    lines = [f"{name}: over {timeout:g} s"]
    if parts:
        text, ranks = next(iter(parts.items()))
        lines = [f"{name} on {len(team)} ranks: {_ranks(ranks)}: {text.partition(chr(10))[0]}"]
    lines += [f"--- {_ranks(ranks)}: {text}" for text, ranks in parts.items()]
    for member in hung:
        why = "still running when another rank failed" if parts else "did not come back"
        lines.append(f"--- rank {member.rank} {why}; its stack:\n{member.stack()}")
    lines += [
        f"--- rank {rank} printed:\n{log}"
        for rank, log in logs.items()
        if log and replies.get(rank, ("hung",))[0] in ("error", "hung")
    ]
    return "\n".join(lines)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
