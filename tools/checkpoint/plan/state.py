"""What is not a tensor: arguments, parameter groups, random states, by rule."""

from __future__ import annotations

import struct
from argparse import Namespace
from copy import copy
from typing import Any

from megatron_moe.tools.checkpoint.model.ranks import Style
from megatron_moe.tools.checkpoint.plan.output import Drop, Target
from megatron_moe.tools.checkpoint.plan.request import Resolved
from megatron_moe.tools.checkpoint.read.open import style_of
from megatron_moe.tools.checkpoint.read.opened import Opened, OptimizerState
from megatron_moe.tools.checkpoint.stored.dtypes import FLOAT32
from megatron_moe.tools.checkpoint.stored.pickles import Inert, Literal

# Classes that Megatron 0.18 and 0.19 pickle into their arguments, and older ones have not.
_NEW_CLASSES = {"InferenceCudaGraphScope"}


def arguments(source: Opened, to: Resolved) -> Namespace:
    """Return the run's arguments with the parallel sizes of the target; nothing else changes."""
    args = copy(source.args)
    layout = to.layout
    changes: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": None,
        "num_virtual_stages_per_pipeline_rank": layout.vpp if layout.vpp > 1 else None,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
        "world_size": layout.world_size,
        "data_parallel_size": layout.dp // layout.cp,
        "context_parallel_size": layout.cp,
        "transformer_pipeline_model_parallel_size": layout.pp,
        "pipeline_model_parallel_layout": to.pipeline.text,
        "decoder_first_pipeline_num_layers": to.pipeline.first,
        "decoder_last_pipeline_num_layers": to.pipeline.last,
        "ckpt_format": to.form,
    }
    old = source.layout
    moved = (old.tp, old.pp) != (layout.tp, layout.pp)
    # Megatron asks for what the arguments say was saved.
    if to.form == "torch_dist" and (moved or not any(source.rng.values())):
        changes["no_save_rng"] = True
    if to.optimizer is None:
        changes["no_save_optim"] = True
    if to.divisible_by is not None:
        changes["make_vocab_size_divisible_by"] = to.divisible_by
    if to.vocabulary is not None:
        changes["padded_vocab_size"] = to.vocabulary
    if layout.tp == 1:
        changes["sequence_parallel"] = False
    if to.optimizer is not None:
        changes["use_distributed_optimizer"] = to.optimizer != "plain"
        changes["dist_ckpt_optim_fully_reshardable"] = to.optimizer == "fully_reshardable"
    for name, value in changes.items():
        if hasattr(args, name):
            setattr(args, name, value)
    if to.style != style_of(source):
        vars(args).update(_build(to.style))
    if to.drop_unknown_args or to.dialect != "0.19":
        for name, value in list(vars(args).items()):
            if isinstance(value, Inert) and type(value).foreign[1] in _NEW_CLASSES:
                delattr(args, name)
    return args


def _build(style: Style) -> dict[str, Any]:
    """Arguments of a run that names its parameters so; buffers are decoded by them."""
    engine = style.fused_norms or style.experts in ("grouped", "single")
    return {
        "transformer_impl": "transformer_engine" if engine else "local",
        "moe_grouped_gemm": style.experts != "sequential",
        "moe_layer_impl": "plugin" if style.experts == "stacked" else "megatron",
        "moe_single_grouped_weight": style.experts == "single",
        "moe_use_legacy_grouped_gemm": style.experts == "grouped_mlp",
    }


def step_number(optimizer: OptimizerState) -> float | None:
    """Return the optimizer's step count."""
    step = optimizer.step
    if isinstance(step, Literal):
        kinds = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i"}
        return float(struct.unpack(kinds[step.dtype.name], step.data)[0])
    return None if step is None else float(step)


def step_tensor(optimizer: OptimizerState) -> Literal:
    """Return the step count as torch's Adam keeps it."""
    return Literal(FLOAT32, (), struct.pack("<f", step_number(optimizer) or 0.0))


def with_scaler(source: Opened, member: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with the loss scaler's, where there is one (fp16)."""
    assert source.optimizer is not None
    if source.optimizer.grad_scaler is not None:
        member["grad_scaler"] = source.optimizer.grad_scaler
    return member


def half_precision(args: Namespace) -> bool:
    """Whether weights have fp32 masters beside them."""
    return any(getattr(args, name, False) for name in ("bf16", "fp16"))


def torch_adam(optimizer: OptimizerState) -> bool:
    """Whether the groups are those of torch's Adam, which keeps a step for each parameter."""
    return "foreach" in optimizer.groups[0]


def member_groups(source: Opened, to: Resolved) -> list[list[dict[str, Any]]]:
    """Return the parameter groups of each of the target's optimizers, without parameters.

    Megatron pairs groups by what they do (``wd_mult``, learning rates), so experts that get an
    optimizer of their own take the groups of the dense ones, and the other way round.
    """
    optimizer = source.optimizer
    assert optimizer is not None
    distributed = to.optimizer != "plain"
    step = step_number(optimizer)

    def groups(own: list[dict[str, Any]], expert: bool) -> list[dict[str, Any]]:
        out = []
        for group in own:
            new = dict(group)
            if "is_expert_parallel" in new:
                new["is_expert_parallel"] = expert
            if torch_adam(optimizer):
                new.pop("step", None)
                if distributed:
                    new["step"] = step
            out.append(new)
        return out

    if not to.layout.separate_experts or not source.inventory.num_experts:
        return [groups(optimizer.groups, False)]
    expert = optimizer.expert_groups
    if expert is None:
        expert = [group for group in optimizer.groups if _fits_experts(group, source)]
    return [groups(optimizer.groups, False), groups(expert, True)]


def _fits_experts(group: dict[str, Any], source: Opened) -> bool:
    """Whether experts have parameters of a group: no weight decay means biases."""
    if group.get("is_decoupled_lr"):
        return False
    biases = any(
        name.startswith("mlp.experts.") and name.endswith(".bias")
        for layer in source.inventory.all_layers()
        for name in layer.kinds
    )
    return group.get("wd_mult", 1.0) != 0.0 or biases


def random_state(source: Opened, to: Resolved, pp: int, tp: int, target: Target) -> Any:
    """Return the random state of a place, by rule.

    The state of a place is kept while TP and PP are. Otherwise it means nothing: ``torch_dist``
    goes without (Megatron then starts from its seed), and ``torch``, which Megatron refuses to
    load without one, takes that of the place with the same numbers modulo the old sizes.
    """
    old, new = source.layout, to.layout
    by_place = {place[:2]: state for place, state in source.rng.items() if state is not None}
    if not by_place:
        if to.form == "torch":
            _say(target, None, "random states: the source has none; Megatron loads a torch "
                 "checkpoint without them only with --no-load-rng")  # fmt: skip
        return None
    same = (old.tp, old.pp) == (new.tp, new.pp)
    if same and (pp, tp) in by_place:
        return by_place[pp, tp]
    if to.form == "torch_dist":
        _say(target, Drop("random states", "TP or PP changed: they belong to ranks that are gone; "
                          "the run starts them from its seed"))  # fmt: skip
        return None
    _say(target, None, "random states: ranks take those of the old rank with their numbers modulo "
         "the old sizes; pass --no-load-rng to start from the seed")  # fmt: skip
    places = sorted(by_place)
    return by_place.get((pp % old.pp, tp % old.tp), by_place[places[0]])


def _say(target: Target, drop: Drop | None, note: str = "") -> None:
    if drop and all(drop.what != other.what for other in target.dropped):
        target.dropped.append(drop)
    if note and note not in target.notes:
        target.notes.append(note)
