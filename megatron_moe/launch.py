"""``megatron-moe run``: start a training script through torch's own elastic launcher."""

import logging
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from megatron_moe.preflight import Layout, check_run, layout_of, read_flags
from megatron_moe.run import DEVICES, USER_FAULT, auto_reason, resolve_device

# torchrun's own, handed on as they are.
_TORCHRUN = {
    "nnodes": "Nodes, or MIN:MAX nodes.",
    "node-rank": "Rank of this node, with --master-addr.",
    "rdzv-backend": "How nodes find each other, e.g. c10d.",
    "rdzv-endpoint": "HOST:PORT of the rendezvous.",
    "rdzv-id": "Name of the job.",
    "rdzv-conf": "KEY=VALUE,… for the rendezvous.",
    "master-addr": "Address of node 0, for the static rendezvous.",
    "master-port": "Port on node 0.",
    "local-addr": "Address of this node.",
    "max-restarts": "Restarts after a failure before giving up.",
    "monitor-interval": "Seconds between looks at the workers.",
    "log-dir": "Where redirected output goes.",
    "redirects": "Output to redirect to files: 1 stdout, 2 stderr, 3 both.",
    "tee": "Output to write to files and the terminal.",
}


def _torchrun_options(command: Any) -> Any:
    for name, text in reversed(_TORCHRUN.items()):
        command = click.option(f"--{name}", help=f"torchrun: {text}")(command)
    return command


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    default="auto",
    envvar="MEGATRON_MOE_DEVICE",
    show_default=True,
    help="Where to run; auto takes the GPUs if there are any.",
)
@click.option(
    "-n",
    "--nproc-per-node",
    type=click.IntRange(min=1),
    help="Processes on this node. Default: one for each GPU; on a CPU the fewest that fit.",
)
@_torchrun_options
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def command(
    device: str,
    nproc_per_node: int | None,
    script: Path,
    args: tuple[str, ...],
    **torchrun: str | None,
) -> None:
    """Start SCRIPT with the plugin active, and hand ARGS to it.

    SCRIPT is a Megatron training script, unmodified: Megatron-LM's own pretrain_gpt.py, for
    instance. With --num-experts among its ARGS, its MoE layers become ours.
    """
    try:
        check_run(script, args)  # before torch is imported to look for a GPU
        found = resolve_device(device)
        layout = layout_of(read_flags(args))
        nodes = _nodes(torchrun["nnodes"])
        number = nproc_per_node or _default_processes(found, layout, nodes)
        check_run(script, args, found, None if nodes is None else nodes * number)
    except ValueError as fault:
        click.echo(f"megatron-moe: {fault}", err=True)
        raise SystemExit(USER_FAULT) from None
    options = [f"--{name.replace('_', '-')}={text}" for name, text in torchrun.items() if text]
    if not any(torchrun[name] for name in ("rdzv_endpoint", "master_addr", "nnodes")):
        # One node: a free port instead of torchrun's fixed one.
        options += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        options += [f"--rdzv-id={uuid.uuid4()}"]
    if device == "auto":
        click.echo(f"megatron-moe: {auto_reason(found)}", err=True)
    if nproc_per_node is None:
        click.echo(f"megatron-moe: {number} processes for {layout}", err=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    worker = ["-m", "megatron_moe.run", "--device", found, str(script), *args]
    raise SystemExit(_launch([*options, f"--nproc-per-node={number}", *worker]))


def _nodes(nnodes: str | None) -> int | None:
    """Return the number of nodes, or None when it may change during the run."""
    if nnodes is None:
        return 1
    low, _, high = nnodes.partition(":")
    try:
        return int(low) if not high or low == high else None
    except ValueError:
        raise ValueError(f"--nnodes {nnodes} must be a number or MIN:MAX") from None


def _default_processes(device: str, layout: Layout, nodes: int | None) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.device_count()
    return max(1, layout.processes // (nodes or 1))


def _launch(torchrun_args: Sequence[str]) -> int:
    """Start the workers, wait for them and return the exit code.

    The launcher's own report of a failure is replaced by one line: the failing process has said
    on stderr what went wrong.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config, entry_point, entry_args = config_from_args(parse_args(list(torchrun_args)))
    try:
        elastic_launch(config=config, entrypoint=entry_point)(*entry_args)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode != USER_FAULT:
            click.echo(f"megatron-moe: rank {rank} failed: {_ending(failure.exitcode)}", err=True)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stopped:
        click.echo(f"megatron-moe: stopped by {stopped.sigval.name}", err=True)
        return 128 + stopped.sigval
    except KeyboardInterrupt:
        click.echo("megatron-moe: stopped", err=True)
        return 130
    return 0


def _ending(exit_code: int) -> str:
    return f"exit code {exit_code}" if exit_code >= 0 else f"killed by signal {-exit_code}"


if __name__ == "__main__":
    sys.exit(command())
