"""Sizes of the parallel axes, as a value; knows nothing of Megatron."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the parallel axes, by Megatron's names; data parallelism takes what is left.

    Args:
        tp: Tensor parallel.
        pp: Pipeline parallel.
        ep: Expert parallel.
        etp: Expert tensor parallel.
        cp: Context parallel.
        vpp: Model chunks on each pipeline stage (interleaved schedule); None for one, plain.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    vpp: int | None = None

    def fits(self, world_size: int) -> bool:
        """Whether Megatron accepts this layout for ``world_size`` ranks."""
        dense, experts = self.tp * self.pp * self.cp, self.etp * self.ep * self.pp
        return world_size % dense == 0 and world_size % experts == 0

    def __str__(self) -> str:
        axes = {"tp": self.tp, "pp": self.pp, "ep": self.ep, "etp": self.etp, "cp": self.cp}
        named = [f"{axis}{size}" for axis, size in axes.items() if size > 1]
        return "-".join([*named, *([f"vpp{self.vpp}"] if self.vpp else [])]) or "dp"


def legal_layouts(world_size: int, num_experts: int = 4) -> list[Layout]:
    """List every layout of ``world_size`` ranks for ``num_experts``, the simplest first."""
    sizes = [n for n in range(1, world_size + 1) if world_size % n == 0]
    candidates = [
        Layout(tp=tp, pp=pp, ep=ep, etp=etp, cp=cp)
        for pp in sizes
        for cp in sizes
        for tp in sizes
        for etp in sizes
        for ep in sizes
        if num_experts % ep == 0
    ]
    return [layout for layout in candidates if layout.fits(world_size)]
