"""A process that may have 1 GB of memory reshards a checkpoint of more than 4 GB."""

import os
import resource
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers.synthetic import SEED, Arch, planned, seed

from megatron_moe.tools.checkpoint.read.open import open_checkpoint
from megatron_moe.tools.checkpoint.read.opened import Opened
from megatron_moe.tools.checkpoint.read.values import AtomReader
from megatron_moe.tools.checkpoint.stored import archive
from megatron_moe.tools.checkpoint.write import manifest
from megatron_moe.tools.checkpoint.write.execute import Options, execute

LIMIT = 1 << 30
ARCH = Arch(moe=(True,) * 3, experts=8, hidden=1024, ffn=4096, vocab=1024)


def fill_fast(opened: Opened) -> None:
    """Write a seed's file from one block of random bytes, at a different place in each record."""
    block = np.random.default_rng(0).bytes((16 << 20) + 8 * 997)
    skeleton = archive.begin(None)
    starts = [skeleton.add(f"data/{r.key}", r.nbytes) for r in opened.tensors.records]
    archive.close(skeleton)
    crcs = {}
    opened.folder.mkdir()
    with (opened.folder / SEED).open("wb") as file:
        for record, start in zip(opened.tensors.records, starts, strict=True):
            crc = done = 0
            while done < record.nbytes:
                piece = memoryview(block)[: record.nbytes - done]
                os.pwrite(file.fileno(), piece, start + done)
                crc, done = zlib.crc32(piece, crc), done + len(piece)
            crcs[f"data/{record.key}"] = crc
        skeleton.write(file.fileno(), crcs)


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_four_gigabytes_in_one(tmp_path: Path, form: str) -> None:
    opened = seed(ARCH, tmp_path / "seed")
    nbytes = sum(record.nbytes for record in opened.tensors.records)
    assert nbytes > 4 * LIMIT
    free = shutil.disk_usage(tmp_path).free
    if free < 4 * nbytes:
        pytest.skip(f"needs {4 * nbytes:,} bytes of disk, {free:,} are free")
    fill_fast(opened)
    source, out = tmp_path / "source", tmp_path / "out"
    plan = planned(opened, form="torch_dist", tp=2, ep=2, etp=1, dp=2, optim="fully")
    execute(plan, source, Options(verify_source=False))
    shutil.rmtree(tmp_path / "seed")
    try:
        program = "from megatron_moe.cli import main; main()"
        options = ["--format", form, "--tp", "4", "--etp", "2", "--ep", "4", "--dp", "2"]
        words = [sys.executable, "-c", program, "reshard", source, out, *options]
        limits = ["--max-ram", "256M", "--workers", "2"]
        done = subprocess.run(
            [*words, *limits], preexec_fn=limited, capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        a, b = open_checkpoint(source), open_checkpoint(out)
        assert manifest.digests_of(a) == manifest.digests_of(b)
        with AtomReader(b) as reader:
            for atom in sorted(b.tensors.atoms)[::97]:
                found = reader.digest(b.tensors.atoms[atom])
                assert found == manifest.digests_of(a)[atom]
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
