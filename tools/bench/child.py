"""Start a measuring process with the allocator pinned, and read what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import Any

import click

from megatron_moe.tools.bench.process import PINNED

ENVIRONMENT = PINNED | {"OMP_NUM_THREADS": "1"}


def measured_by(module: str, job: dict[str, Any], on_line: Callable[[str], None]) -> Any:
    """Run ``python -m module FOLDER``, which reads FOLDER/job and writes FOLDER/results.

    Args:
        module: Below ``megatron_moe.tools.bench``.
        job: What it measures.
        on_line: Called with each line that it prints.

    Raises:
        click.ClickException: It failed; its last lines are shown.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job").write_text(json.dumps(job))
        command = [sys.executable, "-m", f"megatron_moe.tools.bench.{module}", str(folder)]
        with (folder / "log").open("w") as log:
            env = os.environ | ENVIRONMENT
            child = subprocess.Popen(command, env=env, stdout=PIPE, stderr=log, text=True)
            try:
                for line in iter(child.stdout.readline, ""):  # type: ignore[union-attr]
                    on_line(line.strip())
                child.wait()
            except BaseException:
                child.kill()
                child.wait()
                raise
        if child.returncode != 0:
            last = (folder / "log").read_text().splitlines()[-25:]
            raise click.ClickException("\n".join(["the measuring process failed:", *last]))
        return json.loads((folder / "results").read_text())


def refuse_unpinned(command: str) -> None:
    """Check, in the measuring process, that its environment was set before Python started.

    Raises:
        RuntimeError: It was not; ``command`` is what sets it.
    """
    wrong = [name for name, value in ENVIRONMENT.items() if os.environ.get(name) != value]
    if wrong:
        raise RuntimeError(f"{', '.join(wrong)} must be set before Python starts: use {command}")
