"""Parallel layouts: sizes of the axes, which layers a pipeline stage holds, who writes what."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe.tools.checkpoint.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Stage:
    """What one pipeline chunk holds: global numbers of its layers, and the model's ends."""

    layers: tuple[int, ...]
    embedding: bool = False
    mtp: tuple[int, ...] = ()
    output: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the parallel axes.

    Args:
        tp: Tensor parallel.
        pp: Pipeline parallel.
        vpp: Chunks of a pipeline rank (virtual stages).
        ep: Expert parallel.
        etp: Expert tensor parallel; None means ``tp``, as in Megatron.
        dp: Data parallel, context parallel included.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    dp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "ep", "etp", "dp", "cp"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise CheckpointError(f"--{name} {size}: a parallel size is at least 1")
        if self.vpp > 1 and self.pp == 1:
            raise CheckpointError(
                f"--vpp {self.vpp} with --pp 1: virtual stages divide the layers of pipeline "
                "stages; pass --pp 2 or more, or leave --vpp out"
            )

    @property
    def expert_tp(self) -> int:
        """Size of the expert tensor-parallel axis."""
        return self.etp if self.etp is not None else self.tp

    @property
    def separate_experts(self) -> bool:
        """Whether experts have an optimizer of their own."""
        return self.ep > 1 or self.expert_tp != self.tp

    @property
    def world_size(self) -> int:
        """Ranks that a run at this layout has."""
        return self.tp * self.pp * self.dp

    @property
    def expert_dp(self) -> int:
        """Copies of each expert shard.

        Raises:
            CheckpointError: The ranks of a stage are not a multiple of EP·ETP.
        """
        ranks = self.tp * self.dp
        if ranks % (self.ep * self.expert_tp):
            need = self.ep * self.expert_tp
            raise CheckpointError(
                f"--tp {self.tp} --dp {self.dp}: a stage's {ranks} ranks are not a multiple of "
                f"EP·ETP = {self.ep}·{self.expert_tp} = {need}; pass a --dp that makes TP·DP one"
            )
        return ranks // (self.ep * self.expert_tp)

    def smallest_dp(self) -> int:
        """Return the least data-parallel size at which this layout exists."""
        dp = self.cp
        while (self.tp * dp) % (self.ep * self.expert_tp):
            dp += self.cp
        return dp

    def __str__(self) -> str:
        axes = [("TP", self.tp), ("PP", self.pp), ("VPP", self.vpp), ("EP", self.ep)]
        axes += [("ETP", self.expert_tp), ("CP", self.cp), ("DP", self.dp)]
        always = ("TP", "PP", "EP", *(["ETP"] if self.expert_tp != self.tp else []))
        shown = [f"{name}{size}" for name, size in axes if size > 1 or name in always]
        return "·".join(shown)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How layers are dealt to stages.

    Args:
        num_layers: Decoder layers.
        mtp_layers: Multi-token-prediction layers, after the decoder.
        first: Layers of the first stage, where uneven.
        last: Layers of the last stage, where uneven.
        count_embedding: The embedding counts as a layer of the first stage.
        count_loss: The loss counts as a layer of the last stage.
        text: A custom layout, ``Et*3|t*4|t*4mL``.
    """

    num_layers: int
    mtp_layers: int = 0
    first: int | None = None
    last: int | None = None
    count_embedding: bool = False
    count_loss: bool = False
    text: str | None = None

    def stages(self, layout: Layout) -> list[list[Stage]]:
        """Return the chunks of each pipeline rank, ``[pp][vpp]``.

        Raises:
            CheckpointError: The layers cannot be dealt so.
        """
        cells = self._from_text(layout) if self.text else self._from_counts(layout)
        # Chunks follow the model's order by virtual stage first, then by pipeline rank.
        return [[cells[v * layout.pp + p] for v in range(layout.vpp)] for p in range(layout.pp)]

    def _from_counts(self, layout: Layout) -> list[Stage]:
        counts = self._counts(layout)
        cells, at = [], 0
        total = layout.pp * layout.vpp
        for i in range(total):
            v, p = divmod(i, layout.pp)
            count = counts[p] // layout.vpp
            if v == 0 and p == 0 and self.count_embedding:
                count -= 1
            if i == total - 1 and self.count_loss:
                count -= 1
            last = i == total - 1
            mtp = tuple(range(self.mtp_layers)) if last else ()
            cells.append(Stage(tuple(range(at, at + count)), i == 0, mtp, last))
            at += count
        return cells

    def _counts(self, layout: Layout) -> list[int]:
        """Layers of each pipeline rank, the counted ends included."""
        layers = self.num_layers + int(self.count_embedding) + int(self.count_loss)
        fixed = [n for n in (self.first, self.last) if n is not None]
        middle = layout.pp - len(fixed)
        left = layers - sum(fixed)
        rule = f"{self.num_layers} layers over PP {layout.pp} · VPP {layout.vpp}"
        out = (
            "pass --decoder-first-pipeline-num-layers / --decoder-last-pipeline-num-layers, or "
            "--pipeline-layout"
        )
        if layout.pp == 1:
            counts = [layers]
        elif middle < 0 or left < 0 or (left % middle if middle else left):
            raise CheckpointError(
                f"{rule}: {left} layers do not divide over {middle} stages; {out}"
            )
        else:
            counts = [left // middle] * middle if middle else []
            counts = ([self.first] if self.first is not None else []) + counts
            counts += [self.last] if self.last is not None else []
        if any(count % layout.vpp for count in counts):
            raise CheckpointError(f"{rule}: a stage's {counts} layers do not divide by VPP; {out}")
        return counts

    def _from_text(self, layout: Layout) -> list[Stage]:
        text = _expand(self.text or "")
        cells = text.split("|")
        total = layout.pp * layout.vpp
        if len(cells) != total:
            raise CheckpointError(
                f"--pipeline-layout {self.text!r} has {len(cells)} stages, PP·VPP is {total}: "
                "make them equal"
            )
        stages, layer, mtp = [], 0, 0
        for cell in cells:
            decoders, ahead = cell.count("t"), cell.count("m")
            stages.append(
                Stage(
                    tuple(range(layer, layer + decoders)),
                    "E" in cell,
                    tuple(range(mtp, mtp + ahead)),
                    "L" in cell,
                )
            )
            layer, mtp = layer + decoders, mtp + ahead
        if (layer, mtp) != (self.num_layers, self.mtp_layers):
            raise CheckpointError(
                f"--pipeline-layout {self.text!r} holds {layer} decoder and {mtp} MTP layers, the "
                f"checkpoint {self.num_layers} and {self.mtp_layers}: make them equal"
            )
        return stages


_TIMES = re.compile(r"(\([^()]*\)|\w)\*(\d+)")


def _expand(text: str) -> str:
    """Write out repetitions: ``t*3|(t|)*2`` is ``ttt|t|t|``."""
    text = re.sub(r"[\s,]", "", text)
    while found := _TIMES.search(text):
        unit = found[1].strip("()")
        text = text[: found.start()] + unit * int(found[2]) + text[found.end() :]
    return text


@dataclass(frozen=True)
class Coordinates:
    """A model-parallel place: one file of the legacy format, one writer of the other."""

    tp: int
    pp: int
    ep: int
    etp: int


class Places:
    """The model-parallel places of a layout that write legacy files.

    Ranks of a stage are numbered tp fastest for dense tensors, and etp, ep fastest for experts. A
    rank writes when it is the first of its dense or of its expert replicas; the file's name has
    its tp, pp and ep.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def writers(self) -> Iterator[tuple[Coordinates, bool, bool]]:
        """Yield each file's place, and whether its rank leads the dense and the expert replicas."""
        layout = self.layout
        for pp in range(layout.pp):
            for rank in range(layout.tp * layout.dp):
                dense = rank < layout.tp
                experts = rank < layout.expert_tp * layout.ep
                if dense or experts:
                    etp, ep = rank % layout.expert_tp, rank // layout.expert_tp % layout.ep
                    yield Coordinates(rank % layout.tp, pp, ep, etp), dense, experts

    @property
    def files(self) -> list[Coordinates]:
        """Places of all files."""
        return [place for place, _, _ in self.writers()]
