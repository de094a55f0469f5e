"""The data set helpers of the wheel are compiled already."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_moe.mcore.patching import Patch

_HELPERS = "megatron.core.datasets.helpers_cpp"


@contextmanager
def helpers_of_wheel() -> Iterator[None]:
    """Let a Megatron-LM checkout, which has only their source, find the wheel's helpers."""
    places = importlib.import_module("megatron.core.datasets").__path__
    wheel = _in_wheel()
    if importlib.util.find_spec(_HELPERS) is not None or wheel is None:
        yield
        return
    places.append(wheel)
    try:
        yield
    finally:
        places.remove(wheel)


def _in_wheel() -> str | None:
    try:
        distribution = importlib.metadata.distribution("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return None  # a checkout alone: Megatron compiles them
    return str(Path(str(distribution.locate_file("megatron/core/datasets"))))


def _compile_helpers(original: Callable[[], None]) -> None:
    if importlib.util.find_spec(_HELPERS) is None:
        original()


PATCHES = (
    Patch(
        target="megatron.core.datasets.utils.compile_helpers",
        wrapper=_compile_helpers,
        reason="the wheel has helpers_cpp but no Makefile, and a failing make ends the process",
        retire_when="the wheel ships the Makefile, or compile_helpers looks before it builds",
        versions=">=0.19,<0.20",
        fingerprints=("84029a50ae8c",),
    ),
)
