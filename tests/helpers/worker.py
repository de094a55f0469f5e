"""The far side of the pool: one warm template process, and the workers forked from it.

Importing torch and Megatron costs 15 to 20 s of CPU, so it is done once, in the template. A worker
is a fork of it and starts in a fraction of a second, also after a team had to be killed.
"""

import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from helpers import wire

_in_force: list[Any] = []
_ONE_CALL_AT_MOST = timedelta(minutes=30)  # the pool's own limit is shorter and says more


@dataclass(frozen=True)
class World:
    """What a function run by the pool is told about its team."""

    rank: int
    world_size: int
    group: Any  # torch.distributed.ProcessGroup of the whole team, gloo


def main() -> None:
    """Import everything once, then fork a worker for each request on the control socket."""
    control = socket.socket(fileno=int(sys.argv[1]))
    _preload(megatron=sys.argv[2] == "megatron")
    control.send(b"ready")
    while True:
        data, fds, _, _ = socket.recv_fds(control, 65536, 1)
        if not data:
            return  # pytest is gone; the workers follow by PR_SET_PDEATHSIG
        pid = os.fork()
        if pid == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _serve(Connection(fds[0]), **json.loads(data))
        os.close(fds[0])
        control.send(str(pid).encode())


def _preload(megatron: bool) -> None:
    import gc
    import logging

    import hypothesis  # noqa: F401  (test files import these)
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    logging.getLogger("megatron").setLevel(logging.WARNING)  # else it lists every parameter
    if megatron:
        from megatron_moe.activate import activate

        # Kept for good: when the stack is collected, it takes the patches out again.
        _in_force.append(activate("cpu"))
    # Nobody waits for the workers, so let the kernel reap them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # keeps the pages shared after the fork, and later collections short


def _serve(connection: Connection, *, rank: int, world_size: int, port: int, **rest: Any) -> None:
    """Be the worker ``rank`` of a team until the connection closes."""
    try:
        _die_with_parent()
        _redirect(Path(rest["folder"]), rank)
        world, cache = _join(rank, world_size, port, rest["prefix"])
        _loop(connection, world, cache)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _redirect(folder: Path, rank: int) -> None:
    log = (folder / f"rank{rank}.log").open("ab", buffering=0)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    stack = (folder / f"rank{rank}.stack").open("w")
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    faulthandler.enable(file=sys.stderr)


def _join(rank: int, world_size: int, port: int, prefix: str) -> tuple[World, Any]:
    import torch.distributed as dist
    from helpers.isolation import GroupCache

    store = dist.PrefixStore(prefix, dist.TCPStore("127.0.0.1", port, is_master=False))
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=_ONE_CALL_AT_MOST
    )
    cache = GroupCache()
    if "megatron.core" in sys.modules:
        cache.install()
    return World(rank, world_size, dist.group.WORLD), cache


def _loop(connection: Connection, world: World, cache: Any) -> None:
    from helpers.isolation import Snapshot, reset_torch

    snapshot = Snapshot()
    reset_torch()
    while True:
        try:
            kind, *body = wire.unpack(connection.recv_bytes())
        except EOFError:
            return
        if kind == "reset":
            cache.destroy_others()
            snapshot.restore()
        else:
            connection.send_bytes(_run(world, *body))


def _run(world: World, address: wire.FunctionAddress, payload: bytes) -> bytes:
    start = time.perf_counter()
    try:
        function = wire.find_function(address)
        args, kwargs = wire.unpack(payload)
        result = function(world, *args, **kwargs)
        return wire.pack(("ok", result, time.perf_counter() - start))
    except Exception as error:
        return wire.pack(("error", _describe(error), time.perf_counter() - start))


def _describe(error: BaseException) -> str:
    """Return the traceback without this file's frames, then the locals of the innermost test frame.

    Pytest's rewriting of ``assert`` does not reach the workers; the locals make up for it.
    """
    steps = [
        s for s in traceback.walk_tb(error.__traceback__) if s[0].f_code.co_filename != __file__
    ]
    trimmed = error.__traceback__
    while trimmed is not None and trimmed.tb_frame.f_code.co_filename == __file__:
        trimmed = trimmed.tb_next
    # The last line first: pytest's summary shows no more than the first line of a message.
    summary = traceback.format_exception_only(error)[-1].strip().partition("\n")[0]
    text = f"{summary}\n{_shortened(traceback.TracebackException(type(error), error, trimmed))}"
    ours = [frame for frame, _ in steps if "/tests/" in frame.f_code.co_filename]
    if not ours:
        return text
    values = ours[-1].f_locals.items()
    # The team differs by rank; without it, equal failures read equal and are shown once.
    lines = [f"    {k} = {_short(v)}" for k, v in values if not isinstance(v, World)]
    return "\n".join([text, f"  locals of {ours[-1].f_code.co_name}:", *lines[:30]])


def _shortened(trace: traceback.TracebackException) -> str:
    """Format without carets and without torch's own steps from `__call__` to `forward`."""
    kept = [step for step in trace.stack if not step.filename.endswith("nn/modules/module.py")]
    plain = [traceback.FrameSummary(s.filename, s.lineno, s.name, line=s.line) for s in kept]
    trace.stack = traceback.StackSummary.from_list(plain)
    return "".join(trace.format()).rstrip()


def _short(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except Exception as error:
        text = f"<repr failed: {error!r}>"
    return text if len(text) <= 200 else text[:197] + "..."


if __name__ == "__main__":
    main()
