"""``megatron-moe reshard`` from a clone, without installing the package.

    python tools/checkpoint/reshard.py CKPT OUT --tp 2 --pp 2 --ep 4

Needs click, numpy and xxhash; neither torch nor Megatron.
"""

import os
import sys

# Before anything else is imported: this folder holds modules with names of the standard library's.
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120
sys.path[0] = _ROOT

import importlib.util  # noqa: E402


def _place_tools() -> None:
    """Put ``tools`` where it is installed: inside ``megatron_moe``."""
    import megatron_moe

    if importlib.util.find_spec("megatron_moe.tools"):
        return
    folder = f"{_ROOT}/tools"
    spec = importlib.util.spec_from_file_location(
        "megatron_moe.tools", f"{folder}/__init__.py", submodule_search_locations=[folder]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    megatron_moe.tools = module  # type: ignore[attr-defined]
    spec.loader.exec_module(module)


if __name__ == "__main__":
    _place_tools()
    from megatron_moe.tools.checkpoint.cli import reshard_command

    reshard_command()
