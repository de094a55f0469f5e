"""Parameters under names and in shapes that do not depend on the layout.

A layout cuts a model three ways: layers over pipeline stages, experts over expert-parallel ranks,
tensors over (expert) tensor-parallel ranks. The canonical form undoes all three: global layer
numbers, global expert numbers, whole tensors. Ranks load their slices of it and give back pieces;
pieces are put together without Megatron, so that this can be trusted where Megatron is on trial.
Which dimension is cut follows from the name, never from the marks that the code under test sets.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CUT_ROWS = re.compile(r"(linear_qkv|linear_fc1|word_embeddings|output_layer)\.(weight|bias)$")
_CUT_COLUMNS = re.compile(r"(linear_proj|linear_fc2)\.weight$")
# Three spellings: an MLP each; one linear layer with weight0, weight1, ...; one stacked weight.
_EXPERT = re.compile(
    r"(?P<path>(.*\.)?experts)\.(local_experts\.(?P<sequential>\d+)\.)?"
    r"(?P<linear>linear_fc[12])\.(?P<kind>weight|bias)(?P<grouped>\d*)$"
)
_LAYER = re.compile(r"^decoder\.layers\.\d+")


@dataclass(frozen=True)
class Cut:
    """How one rank's tensor lies in the whole one.

    Args:
        dim: Dimension that is cut; None when every rank has all of it.
        index: Which part this is.
        count: Into how many parts it is cut.
        blocks: 2 for gated FC1, whose parts each hold [gate; up] of their own rows.
    """

    dim: int | None = None
    index: int = 0
    count: int = 1
    blocks: int = 1

    def take(self, whole: Tensor) -> Tensor:
        """Return this rank's part."""
        if self.dim is None or self.count == 1:
            return whole
        blocks = whole.chunk(self.blocks, dim=self.dim)
        return torch.cat([b.chunk(self.count, dim=self.dim)[self.index] for b in blocks], self.dim)


@dataclass(frozen=True)
class Piece:
    """One rank's part of one canonical tensor."""

    name: str
    cut: Cut
    tensor: Tensor


@dataclass(frozen=True)
class AxisPlaces:
    """Where this rank stands on the axes that cut tensors."""

    tp_rank: int
    tp_size: int
    etp_rank: int
    etp_size: int
    ep_rank: int


def cut_of(name: str, places: AxisPlaces, gated: bool) -> Cut:
    """Return how this rank's part of ``name`` is cut."""
    routed = bool(re.search(r"(^|\.)experts\.", name))
    index, count = (
        (places.etp_rank, places.etp_size) if routed else (places.tp_rank, places.tp_size)
    )
    if _CUT_ROWS.search(name):
        return Cut(0, index, count, 2 if gated and "linear_fc1" in name else 1)
    return Cut(1, index, count) if _CUT_COLUMNS.search(name) else Cut()


@dataclass(frozen=True)
class Slot:
    """One canonical parameter in a model: a parameter, or one expert's part of a stacked one."""

    name: str
    parameter: Tensor
    expert: int | None = None

    def of(self, values: Tensor) -> Tensor:
        """Return this slot's part of something shaped like the parameter (a view)."""
        return values if self.expert is None else values[self.expert]


def slots_of(chunk: torch.nn.Module, places: AxisPlaces) -> Iterator[Slot]:
    """Yield every canonical parameter of a model chunk (or of a layer alone)."""
    model = _unwrapped(chunk)
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        prefix, rest = _global_layer(name, modules)
        found = _EXPERT.match(rest)
        if not found:
            yield Slot(prefix + rest, parameter)
            continue
        experts = modules[name.removesuffix(rest) + found["path"]]
        first = places.ep_rank * experts.num_local_experts
        tail = found["linear"] + "." + found["kind"]
        local = found["sequential"] or found["grouped"]
        for index in [int(local)] if local else range(experts.num_local_experts):
            whole = f"{prefix}{found['path']}.{first + index}.{tail}"
            yield Slot(whole, parameter, None if local else index)


def bias_pieces(chunks: list[torch.nn.Module]) -> list[Piece]:
    """Return the routers' state of balance, which the end of a global batch updates."""
    pieces = []
    for model in map(_unwrapped, chunks):
        modules = dict(model.named_modules())
        for name, buffer in model.named_buffers():
            if name.endswith(("expert_bias", "qb_beta", "choice_cut")):
                pieces.append(Piece("".join(_global_layer(name, modules)), Cut(), buffer.clone()))
    return pieces


def _unwrapped(model: Any) -> torch.nn.Module:
    while hasattr(model, "module"):
        model = model.module
    return model


def _global_layer(name: str, modules: dict[str, Any]) -> tuple[str, str]:
    """Split off the layer of a name, with the number it has in the whole model."""
    layer = _LAYER.match(name)
    if layer is None:
        return "", name
    return f"decoder.layers.{modules[layer.group()].layer_number - 1}", name[layer.end() :]


def canonical_tensor(name: str, shape: tuple[int, ...], empty_experts: tuple[int, ...]) -> Tensor:
    """Return the value of a canonical parameter: the same in every layout, process and session.

    Args:
        name: Canonical name.
        shape: Whole shape.
        empty_experts: Experts that no token may choose. The norm before the layer then gives
            every token the same feature 0, and the router's weight for it rules them out.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    if "norm" in name:
        value = 0.1 * drawn + (1.0 if name.endswith("weight") else 0.0)
        if empty_experts and "pre_mlp_layernorm" in name:
            value[0] = 0.0 if name.endswith("weight") else 1.0
    elif name.endswith("bias"):
        value = 0.1 * drawn
    else:
        value = drawn / math.sqrt(shape[-1])
    if empty_experts and name.endswith("router.weight"):
        value[:, 0] = 0.0
        value[list(empty_experts), 0] = -50.0
    return value


@torch.no_grad()
def load_canonical(
    chunks: list[torch.nn.Module],
    places: AxisPlaces,
    *,
    gated: bool,
    empty_experts: tuple[int, ...] = (),
) -> None:
    """Fill a model's parameters with the canonical values."""
    for slot in [slot for chunk in chunks for slot in slots_of(chunk, places)]:
        cut = cut_of(slot.name, places, gated)
        target = slot.of(slot.parameter)
        shape = list(target.shape)
        if cut.dim is not None:
            shape[cut.dim] *= cut.count
        target.copy_(cut.take(canonical_tensor(slot.name, tuple(shape), empty_experts)))


def pieces_of(
    chunks: list[torch.nn.Module],
    places: AxisPlaces,
    read: Callable[[Tensor], Tensor],
    *,
    gated: bool,
) -> list[Piece]:
    """Return this rank's pieces of whatever ``read`` takes from a parameter."""
    return [
        Piece(
            slot.name,
            cut_of(slot.name, places, gated),
            slot.of(read(slot.parameter)).detach().clone(),
        )
        for chunk in chunks
        for slot in slots_of(chunk, places)
    ]


def assemble(ranks: list[list[Piece]]) -> dict[str, Tensor]:
    """Put the pieces of all ranks together.

    Raises:
        AssertionError: Two ranks disagree on the same piece (replicas that drifted apart), or a
            part is missing.
    """
    parts: dict[str, dict[int, tuple[Piece, int]]] = {}
    for rank, pieces in enumerate(ranks):
        for piece in pieces:
            first, other = parts.setdefault(piece.name, {}).setdefault(
                piece.cut.index, (piece, rank)
            )
            torch.testing.assert_close(
                piece.tensor,
                first.tensor,
                rtol=1e-6,
                atol=1e-7,
                msg=lambda text, p=piece, a=other, b=rank: f"ranks {a}, {b} on {p.name}: {text}",
            )
    return {name: join([p for p, _ in found.values()]) for name, found in sorted(parts.items())}


def join(pieces: list[Piece]) -> Tensor:
    """Return the whole tensor of which ``pieces`` are all parts, in any order."""
    cut = pieces[0].cut
    if cut.dim is None:
        return pieces[0].tensor
    ordered = sorted(pieces, key=lambda piece: piece.cut.index)
    found = [piece.cut.index for piece in ordered]
    assert found == list(range(cut.count)), f"{pieces[0].name}: parts {found} of {cut.count}"
    blocks = [piece.tensor.chunk(cut.blocks, dim=cut.dim) for piece in ordered]
    return torch.cat([torch.cat(block, cut.dim) for block in zip(*blocks, strict=True)], cut.dim)
