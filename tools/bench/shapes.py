"""The shapes that are measured, and what our layer should reach at each."""

from __future__ import annotations

from dataclasses import dataclass

NUM_TOKENS = 4096
DTYPES = ("fp32", "bf16")


@dataclass(frozen=True, slots=True)
class Shape:
    """One MoE layer.

    Args:
        name: The model it is cut down from, and by how much.
        hidden: D.
        ffn: F, the hidden size of one expert.
        num_experts: E.
        topk: K.
        goals: Speed relative to upstream's layer to be reached, by dtype.
    """

    name: str
    hidden: int
    ffn: int
    num_experts: int
    topk: int
    goals: dict[str, float]


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("seed", 512, 2048, 8, 2, {"fp32": 1.0, "bf16": 1.0}),
        Shape("mixtral/16", 256, 896, 8, 2, {"fp32": 1.0, "bf16": 1.0}),
        Shape("olmoe/8", 256, 128, 64, 8, {"fp32": 1.2, "bf16": 1.4}),
        Shape("qwen3-30b/8", 256, 96, 128, 8, {"fp32": 1.45, "bf16": 1.7}),
        Shape("dsv3/28", 256, 64, 256, 8, {"fp32": 1.9, "bf16": 2.2}),
    )
}


def minimum_held_bytes(shape: Shape, dtype: str, *, gated: bool) -> int:
    """Bytes that no backward can do without: the input, the pre-activation, the routing.

    The routing is an int64 place and an fp32 weight for each copy. Everything else can be gathered
    or computed again from these.
    """
    size = {"fp32": 4, "bf16": 2}[dtype]
    copies = NUM_TOKENS * shape.topk
    pre_activation = copies * shape.ffn * (2 if gated else 1)
    return (NUM_TOKENS * shape.hidden + pre_activation) * size + copies * (8 + 4)
