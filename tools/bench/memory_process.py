"""The measuring process of the memory account; ``memory.py`` starts it, allocator pinned.

    python -m megatron_moe.tools.bench.memory_process FOLDER

Measures the job of FOLDER/job into FOLDER/results. A line is printed for each setting.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_moe.tools.bench.child import refuse_unpinned
from megatron_moe.tools.bench.clock import fastest_in_turns
from megatron_moe.tools.bench.experts_process import device_clock
from megatron_moe.tools.bench.process import refuse_if_different

UPSTREAM, NONE = "upstream, nothing", "nothing"
TOLERANCE = 1e-5  # of the largest value: recomputed is the same arithmetic


@dataclass(frozen=True, slots=True)
class Setting:
    """What is computed again in backward.

    Args:
        model: Changes of Megatron's configuration.
        moe: Changes of ours.
        flags: How a user asks for it.
    """

    flags: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    moe: Mapping[str, Any] = field(default_factory=dict)


def _selective(module: str) -> Setting:
    changes = {"recompute_granularity": "selective", "recompute_modules": [module]}
    return Setting(f"--recompute-granularity selective --recompute-modules {module}", changes)


def _full(layers: int) -> Setting:
    changes: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform"}
    return Setting(
        f"--recompute-granularity full --recompute-method uniform --recompute-num-layers {layers}",
        changes | {"recompute_num_layers": layers},
    )


SETTINGS = {
    UPSTREAM: Setting("--moe-layer-impl megatron"),
    NONE: Setting(),
    "activation": _selective("moe_act"),
    "experts": Setting("--moe-recompute-experts", moe={"recompute_experts": True}),
    "MoE layer": _selective("moe"),
    "every layer": _full(1),
    "every 2 layers": _full(2),
    "every 4 layers": _full(4),
}


@dataclass(frozen=True, slots=True)
class MemoryJob:
    """What the process measures.

    Args:
        device: ``cpu`` or ``cuda``.
        rounds: Of which the fastest counts.
        sequence: S.
        batch: B.
        layers: Of the GPT.
        hidden: D.
        ffn: F.
        experts: E.
        topk: K.
        heads: Of attention.
        vocabulary: Token ids.
    """

    device: str
    rounds: int
    sequence: int
    batch: int
    layers: int = 8
    hidden: int = 256
    ffn: int = 512
    experts: int = 8
    topk: int = 2
    heads: int = 4
    vocabulary: int = 512

    def as_json(self) -> dict[str, Any]:
        """For the process that measures."""
        return asdict(self)


def main(folder: Path) -> None:
    """Measure the job of a folder.

    Raises:
        RuntimeError: The environment was not set before Python started.
        ValueError: A setting gives other losses or gradients.
    """
    refuse_unpinned("memory.py")
    job = MemoryJob(**json.loads((folder / "job").read_text()))
    from megatron_moe.activate import activate

    with activate("cuda" if job.device == "cuda" else "cpu"):
        import torch

        from megatron_moe.tools.bench.sides import enter_world

        torch.set_num_threads(1)
        enter_world()
        results = measure(job)
        torch.distributed.destroy_process_group()
    (folder / "results").write_text(json.dumps(results))


def measure(job: MemoryJob) -> dict[str, dict[str, Any]]:
    """Compare all settings, count their bytes, then time them in turns.

    Returns:
        By setting, what :meth:`SmallGPT.account` found and ``seconds`` of a step.

    Raises:
        ValueError: A setting gives other losses or gradients than without recompute.
    """
    from megatron_moe.tools.bench.memory_gpt import SmallGPT

    models: dict[str, SmallGPT] = {}
    for name, setting in SETTINGS.items():
        print(f"building {name}", flush=True)
        models[name] = SmallGPT(job, setting, plugin=name != UPSTREAM, like=models.get(UPSTREAM))
        models[name].step()  # allocates the gradients, which are no part of the account
    expected = models[NONE].results()
    for name, model in models.items():
        worst = model.difference(expected)
        if name != UPSTREAM:
            refuse_if_different({name: worst}, "recompute", "fp32", TOLERANCE)
    found = {}
    for name, model in models.items():
        print(f"counting {name}", flush=True)
        found[name] = model.account()
    steps: dict[str, Callable[[], None]] = {name: model.step for name, model in models.items()}
    seconds = fastest_in_turns(steps, job.rounds, device_clock(job.device))
    return {name: account | {"seconds": seconds[name]} for name, account in found.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
