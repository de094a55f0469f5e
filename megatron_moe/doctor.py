"""``megatron-moe doctor``: what is installed, what is used of it, and why not more."""

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

import click
from packaging.specifiers import SpecifierSet

from megatron_moe.version import MEGATRON_VERSIONS, __version__


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``fault`` when nothing can run with it as it is."""

    name: str
    found: str
    means: str
    fault: bool = False


def find() -> list[Finding]:
    """Look at this machine; imports torch, but not Megatron."""
    return [
        Finding("megatron-moe", __version__, "this plugin"),
        Finding("Python", platform.python_version(), "3.12 or newer"),
        _megatron(),
        *_torch(),
        _optional(
            "transformer-engine",
            "transformer_engine",
            "grouped experts, FP8 and fused attention on a GPU; hidden from --device cpu, where "
            "its kernels cannot run",
            "on a GPU torch's own grouped matmul serves; no FP8 (pip install megatron-moe[te])",
        ),
        _optional(
            "apex",
            "apex",
            "fused optimizer and norms on a GPU; hidden from --device cpu",
            "torch's own optimizer and norms serve",
        ),
        _optional(
            "deep_ep",
            "deep_ep",
            "--moe-token-dispatcher-type flex on a GPU",
            "alltoall and allgather serve; flex is refused",
        ),
        _checkpoints(),
        *(
            _optional(name, name, "Megatron's checkpoints", "saving a checkpoint fails", fault=True)
            for name in ("psutil", "setuptools")
        ),
    ]


def _checkpoints() -> Finding:
    """The known fault in what this Megatron saves."""
    version = _version("megatron-core") or "none"
    means = (
        "up to 0.19.2 --dist-ckpt-optim-fully-reshardable with --overlap-grad-reduce may save "
        "shifted optimizer state (its PR 5077): `megatron-moe verify CKPT` finds it, "
        "`megatron-moe inspect CKPT` says whether yours is at risk"
    )
    return Finding("saved optimizer state", f"megatron-core {version}", means)


def _megatron() -> Finding:
    version = _version("megatron-core")
    if version is None:
        means = "nothing trains without it: pip install 'megatron-core[training]'"
        return Finding("megatron-core", "missing", means, fault=True)
    if not SpecifierSet(MEGATRON_VERSIONS).contains(version, prereleases=True):
        return Finding("megatron-core", version, f"outside {MEGATRON_VERSIONS}", fault=True)
    return Finding("megatron-core", version, f"within {MEGATRON_VERSIONS}")


def _torch() -> list[Finding]:
    import torch

    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    found = [Finding("torch", torch.__version__, built)]
    if not torch.cuda.is_available():
        means = "--device auto runs on the CPU over gloo: for trying and testing, not for speed"
        return [*found, Finding("device", "CPU", means)]
    count, name = torch.cuda.device_count(), torch.cuda.get_device_name(0)
    major, minor = torch.cuda.get_device_capability(0)
    means = f"compute capability {major}.{minor}; --device auto runs here over NCCL"
    return [*found, Finding("device", f"{count} x {name}", means)]


def _optional(
    distribution: str, module: str, present: str, absent: str, *, fault: bool = False
) -> Finding:
    if importlib.util.find_spec(module) is None:
        return Finding(distribution, "missing", absent, fault=fault)
    return Finding(distribution, _version(distribution) or "found", present)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@click.command()
def command() -> None:
    """Say what is installed, what it enables, and why not more.

    Exits with 1 when nothing can run here.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    findings = find()
    table = Table("", "found", "means", box=None, header_style="bold")
    for finding in findings:
        cells = (finding.name, finding.found, finding.means)
        table.add_row(*map(escape, cells), style="red" if finding.fault else "")
    Console().print(table)
    raise SystemExit(1 if any(finding.fault for finding in findings) else 0)
