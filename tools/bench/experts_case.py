"""What the experts benchmark measures: sizes, workloads, points of the choice table."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_moe.tools.bench.shapes import SHAPES, Shape

DTYPES = ("fp32", "bf16")
# Token counts: of the CPU, of the CPU in a hurry, of a GPU.
TOKENS, QUICK_TOKENS, CUDA_TOKENS = 2048, 512, 16384
MOST_PADDED = 8  # times the work, beyond which the padded form is compared but not timed
# The models themselves, for a GPU; on a CPU they are cut down as in ``shapes``.
CUDA_SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mixtral", 4096, 14336, 8, 2, {}),
        Shape("olmoe", 2048, 1024, 64, 8, {}),
        Shape("qwen3-30b", 2048, 768, 128, 8, {}),
        Shape("dsv3-ep8", 7168, 2048, 32, 8, {}),
        Shape("sonic-30b-n512", 4096, 512, 128, 8, {}),
    )
}
# Against whom all are compared, and the forms of our grouped experts.
UPSTREAM, LIMIT, TE = "upstream", "limit", "TE grouped"
GROUPED = ("grouped_mm", "loop", "batched", "auto")
SEPARATE = "separate weights"
SIDES = (UPSTREAM, "sequential", *GROUPED, SEPARATE)


def shapes_of(device: str) -> dict[str, Shape]:
    """The shapes of a device, by name."""
    return CUDA_SHAPES if device == "cuda" else SHAPES


def _drawn(rows: int, weights: list[float]) -> list[int]:
    """Rows of each expert when each row draws one with these weights; the same on every run."""
    drawn = random.Random(1).choices(range(len(weights)), weights, k=rows)
    rows_e = [0] * len(weights)
    for expert in drawn:
        rows_e[expert] += 1
    return rows_e


def _hot(rows: int, num_experts: int) -> list[int]:
    first = rows // 2
    return [first, *_drawn(rows - first, [1.0] * (num_experts - 1))]


# Rows of each expert, from the rows of all and the number of experts.
WORKLOADS: dict[str, Callable[[int, int], list[int]]] = {
    "balanced": lambda rows, e: _drawn(rows, [1.0] * e),
    "hot": _hot,
    "zipf": lambda rows, e: _drawn(rows, [1.0 / (i + 1) for i in range(e)]),
    "padded": lambda rows, e: [rows // e] * e,
    "few": lambda rows, e: random.Random(1).choices(range(4, 17), k=e),
}
WORKLOAD_NOTE = (
    "balanced: each row draws its expert · hot: one expert has half · zipf: the i-th expert is "
    "drawn with weight 1/i · padded: all equal, as with a padded capacity · few: 4–16 an expert"
)


@dataclass(frozen=True, slots=True)
class Point:
    """One linear layer of all experts, at which the forms of the product are compared.

    Args:
        hidden: D.
        ffn: F.
        num_experts: E.
        rows: Of an expert, in the mean.
        padding: Rows of the fullest, as a multiple of the mean.
    """

    hidden: int
    ffn: int
    num_experts: int
    rows: int
    padding: float

    @property
    def elements(self) -> int:
        """Of one expert's weight."""
        return self.hidden * self.ffn

    def rows_e(self) -> list[int]:
        """Rows as ragged as routing makes them; mean and fullest are exact.

        Equal counts but for one would flatter a form that has to handle each size of its own.
        """
        most = round(self.rows * self.padding)
        least = max(0, 2 * self.rows - most)
        draw = random.Random(1)
        rows_e = [most] + [draw.randint(least, most) for _ in range(self.num_experts - 1)]
        while over := sum(rows_e) - self.rows * self.num_experts:
            expert, change = draw.randrange(1, self.num_experts), -1 if over > 0 else 1
            if least <= rows_e[expert] + change <= most:
                rows_e[expert] += change
        return rows_e


PADDINGS = (1.0, 1.25, 1.5, 2.0)
_CPU_LAYERS = ((256, 64, 64), (256, 128, 64), (256, 896, 8), (512, 2048, 8))
_CUDA_LAYERS = ((4096, 512, 128), (2048, 768, 128), (2048, 1024, 64), (7168, 2048, 32))


def points_of(device: str) -> list[Point]:
    """The points of the choice table, all paddings and rows at every size of an expert."""
    layers = _CUDA_LAYERS if device == "cuda" else _CPU_LAYERS
    rows = (16, 64, 256, 1024, 4096) if device == "cuda" else (4, 16, 64, 128, 256)
    return [Point(*layer, r, padding) for layer in layers for r in rows for padding in PADDINGS]


@dataclass(frozen=True, slots=True)
class ExpertsJob:
    """What one process measures.

    Args:
        device: ``cpu`` or ``cuda``.
        dtypes: ``fp32``, ``bf16``.
        rounds: Of which the fastest counts.
        shapes: Names of shapes at which whole expert stages are compared; may be none.
        workloads: Names of workloads.
        tokens: T.
        points: At which forms of the product are compared; may be none.
    """

    device: str
    dtypes: list[str]
    rounds: int
    shapes: list[str] = field(default_factory=list)
    workloads: list[str] = field(default_factory=lambda: list(WORKLOADS))
    tokens: int = TOKENS
    points: list[Point] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For the process that measures."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> ExpertsJob:
        """What :meth:`as_json` gave."""
        return cls(**(found | {"points": [Point(**point) for point in found["points"]]}))
