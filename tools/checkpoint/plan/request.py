"""What the user asks for, resolved against what the source is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm
from typing import Any

from megatron_moe.tools.checkpoint.errors import CheckpointError
from megatron_moe.tools.checkpoint.model.catalogue import EMBEDDING
from megatron_moe.tools.checkpoint.model.layout import Layout, Pipeline, Stage
from megatron_moe.tools.checkpoint.model.ranks import Style
from megatron_moe.tools.checkpoint.read.open import pipeline_of, style_of
from megatron_moe.tools.checkpoint.read.opened import Opened

FORMS = ("torch", "torch_dist")
DIALECTS = ("0.16", "0.17", "0.19")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Options of ``reshard``; None keeps what the source has.

    Args:
        tp: Tensor-parallel size, and so on.
        form: ``torch`` or ``torch_dist``.
        dialect: Megatron minor that is to read it.
        optim: ``keep``, ``drop``, ``plain`` (no distributed optimizer), ``fully``, ``dp``.
        experts: Spelling of expert keys in legacy files and order in flat buffers.
        spec: ``local`` or ``te``: how norms are named.
        first: Layers of the first pipeline stage.
        last: Layers of the last.
        pipeline_layout: Custom layout, ``Et*3|t*4L``.
        divisible_by: Padding of the vocabulary (``--make-vocab-size-divisible-by``).
        links: Whether files whose bytes do not change may be hard-linked.
        drop_unknown_args: Leave out arguments of classes that an older Megatron has not.
    """

    tp: int | None = None
    pp: int | None = None
    vpp: int | None = None
    ep: int | None = None
    etp: int | None = None
    dp: int | None = None
    form: str | None = None
    dialect: str | None = None
    optim: str = "keep"
    experts: str | None = None
    spec: str | None = None
    first: int | None = None
    last: int | None = None
    pipeline_layout: str | None = None
    divisible_by: int | None = None
    links: bool = True
    drop_unknown_args: bool = False


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A request with every choice made.

    Args:
        layout: Target's parallel sizes.
        pipeline: How layers are dealt.
        stages: What each chunk holds, ``[pp][vpp]``.
        form: Format.
        dialect: Megatron minor.
        optimizer: Kind as in :class:`OptimizerState`, or None.
        style: Names in modules.
        vocabulary: Padded rows of the embedding; None without one.
        stacked_layers: ``torch_dist`` with one tensor for all layers.
        divisible_by: Padding of the vocabulary that was asked for.
        links: Whether files may be hard-linked.
        drop_unknown_args: Whether arguments of newer classes are left out.
    """

    layout: Layout
    pipeline: Pipeline
    stages: list[list[Stage]]
    form: str
    dialect: str
    optimizer: str | None
    style: Style
    vocabulary: int | None
    stacked_layers: bool
    divisible_by: int | None = None
    links: bool = True
    drop_unknown_args: bool = False


def resolve(source: Opened, request: Request) -> Resolved:
    """Make every choice that the request leaves open; refuse what cannot be.

    Raises:
        CheckpointError: Names option, value, rule and the way out.
    """
    layout = _layout(source, request)
    form = request.form or source.location.form
    if form == "torch" and layout.expert_tp > layout.tp:
        raise CheckpointError(
            f"--format torch --etp {layout.expert_tp} --tp {layout.tp}: torch file names have no "
            "ETP, so with ETP > TP ranks would share files: pass --format torch_dist"
        )
    if form == "torch" and layout.tp % layout.expert_tp:
        raise CheckpointError(
            f"--format torch --etp {layout.expert_tp} --tp {layout.tp}: ETP must divide TP in this "
            "format: pass --format torch_dist"
        )
    if form == "torch" and source.inventory.unknown:
        raise CheckpointError(
            f"--format torch: {source.inventory.unknown[0]} is in no rule: how ranks cut it is not "
            "known. Add a Rule (megatron_moe.checkpoint_rules, docs/checkpoints.md), or pass "
            "--format torch_dist"
        )
    optimizer = _optimizer(source, request, form)
    if form == "torch" or optimizer == "dp_reshardable":
        _check_cuts_known(source, layout)
    pipeline = _pipeline(source, request, layout)
    _check_divides(source, layout)
    return Resolved(
        layout=layout,
        pipeline=pipeline,
        stages=pipeline.stages(layout),
        form=form,
        dialect=request.dialect or ("0.19" if form == "torch" else _dialect(source)),
        optimizer=optimizer,
        style=_style(source, request),
        vocabulary=_vocabulary(source, request, layout),
        stacked_layers=_stacked(source),
        divisible_by=request.divisible_by,
        links=request.links,
        drop_unknown_args=request.drop_unknown_args,
    )


def _dialect(source: Opened) -> str:
    return source.dialect if source.dialect in DIALECTS else "0.19"


def _layout(source: Opened, request: Request) -> Layout:
    old = source.layout
    sizes: dict[str, Any] = {"cp": old.cp}
    for name in ("tp", "pp", "ep"):
        wanted = getattr(request, name)
        sizes[name] = wanted if wanted is not None else getattr(old, name)
    sizes["vpp"] = request.vpp or (old.vpp if sizes["pp"] == old.pp else 1)
    # Megatron's own default is ETP = TP, saved as a number; a source's ETP of its own is kept.
    follows = old.expert_tp == old.tp
    sizes["etp"] = request.etp or (sizes["tp"] if follows else old.etp)
    layout = Layout(**sizes)
    if request.dp is not None:
        layout = replace(layout, dp=request.dp * old.cp)
        _ = layout.expert_dp
        return layout
    ranks = old.tp * old.pp * old.dp
    dp = max(ranks // (layout.tp * layout.pp), 1)
    if dp % layout.cp or (layout.tp * dp) % (layout.ep * layout.expert_tp):
        dp = layout.smallest_dp()
    return replace(layout, dp=dp)


def _pipeline(source: Opened, request: Request, layout: Layout) -> Pipeline:
    pipeline = pipeline_of(source.args, source.inventory)
    if request.pipeline_layout is not None:
        return replace(pipeline, text=request.pipeline_layout, first=None, last=None)
    if (layout.pp, layout.vpp) != (source.layout.pp, source.layout.vpp):
        pipeline = replace(pipeline, text=None, first=None, last=None)
    if request.first is not None or request.last is not None:
        pipeline = replace(pipeline, text=None, first=request.first, last=request.last)
    return pipeline


def _check_divides(source: Opened, layout: Layout) -> None:
    inventory = source.inventory
    if inventory.num_experts % layout.ep:
        raise CheckpointError(
            f"--ep {layout.ep}: {inventory.num_experts} experts do not divide over {layout.ep} "
            "ranks; choose a divisor"
        )
    if layout.ep > 1 and not inventory.num_experts:
        raise CheckpointError(f"--ep {layout.ep}: this model has no experts; leave --ep out")
    for layer in inventory.all_layers():
        for name, kind in layer.kinds.items():
            dim = kind.rule.cut_dim
            expert = name.startswith("mlp.experts.")
            size = layout.expert_tp if expert else layout.tp
            if dim is None or kind.rule.vocabulary or kind.shape[dim] % size == 0:
                continue
            raise CheckpointError(
                f"--{'etp' if expert else 'tp'} {size}: dimension {dim} of {name} "
                f"({kind.shape[dim]}) does not divide by it; choose a divisor"
            )
    heads = getattr(source.args, "num_attention_heads", None)
    if isinstance(heads, int) and heads % layout.tp:
        raise CheckpointError(
            f"--tp {layout.tp}: {heads} attention heads do not divide by it; choose a divisor"
        )


def _check_cuts_known(source: Opened, layout: Layout) -> None:
    """A rank's own tensors are needed: then it must be known how each is cut."""
    for layer in source.inventory.all_layers():
        for name, kind in layer.kinds.items():
            if kind.rule.cut == "unknown" and layout.tp > 1:
                raise CheckpointError(
                    f"--tp {layout.tp}: whether {name} is cut over ranks depends on the build; "
                    "pass --format torch_dist with --optim fully, which does not need to know"
                )


def _optimizer(source: Opened, request: Request, form: str) -> str | None:
    if request.optim == "drop":
        return None
    if source.optimizer is None:
        if request.optim != "keep":
            raise CheckpointError(
                f"--optim {request.optim}: the source holds no optimizer state; pass --optim drop "
                "or leave it out"
            )
        return None
    kind = source.optimizer.kind
    if request.optim == "plain":
        return "plain"
    if request.optim == "keep" and kind == "plain":
        return "plain"
    if form == "torch":
        return "distributed"
    if request.optim == "dp" or (request.optim == "keep" and kind == "dp_reshardable"):
        return "dp_reshardable"
    return "fully_reshardable"


def _style(source: Opened, request: Request) -> Style:
    style = style_of(source)
    engine = ("grouped", "single")
    if request.spec == "local" and request.experts in engine:
        raise CheckpointError(
            f"--experts {request.experts} --spec local: these experts exist only in Transformer "
            "Engine's spec; pass --spec te, or --experts stacked for this plugin's"
        )
    if request.spec == "te" and request.experts == "stacked":
        raise CheckpointError(
            "--experts stacked --spec te: this plugin's grouped experts exist only in the local "
            "spec; pass --spec local, or --experts grouped for Transformer Engine's"
        )
    if request.experts:
        fused = request.experts in engine or (style.fused_norms and request.experts != "stacked")
        style = replace(style, experts=request.experts, fused_norms=fused)
    if request.spec:
        style = replace(style, fused_norms=request.spec == "te")
        if request.experts is None:
            style = replace(style, experts=_counterpart(style.experts, request.spec))
    return style


def _counterpart(experts: str, spec: str) -> str:
    """Return the kind of experts that a run has in the other spec."""
    if spec == "te":
        return "grouped" if experts == "stacked" else experts
    return "stacked" if experts in ("grouped", "single") else experts


def _vocabulary(source: Opened, request: Request, layout: Layout) -> int | None:
    kind = source.inventory.outer.kinds.get(EMBEDDING)
    if kind is None:
        return None
    stored, args = kind.shape[0], source.args
    true = getattr(args, "vocab_size", None)
    by = request.divisible_by or getattr(args, "make_vocab_size_divisible_by", None) or 128
    if isinstance(true, int) and not isinstance(true, bool):
        padded = -(-true // (by * layout.tp)) * by * layout.tp
        if padded % layout.tp == 0 and stored == getattr(args, "padded_vocab_size", stored):
            return padded
    # The true size is not known: keep the rows, padded further only where TP asks for it.
    return (
        -(-stored // layout.tp) * layout.tp
        if request.divisible_by is None
        else (-(-stored // lcm(by, layout.tp)) * lcm(by, layout.tp))
    )


def _stacked(source: Opened) -> bool:
    """Whether ``torch_dist`` has one tensor for all layers, as the run's build would write."""
    if source.location.form == "torch_dist" and not source.singletons:
        return source.stacked_layers
    args = source.args
    frequency = getattr(args, "moe_layer_freq", 1)
    mixed = not isinstance(frequency, int) or frequency > 1
    return not (
        mixed
        or getattr(args, "hetereogenous_dist_checkpoint", False)
        or getattr(args, "heterogeneous_layers_config_path", None)
        or getattr(args, "heterogeneous_layers_config_encoded_json", None)
        or (getattr(args, "linear_attention_freq", None) or 1) != 1
    )
