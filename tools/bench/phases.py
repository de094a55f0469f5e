"""A layer cut into its stages, each run and differentiated on its own.

Between two stages the graph is cut: a stage's outputs are detached, become leaves, and collect the
gradients of all later stages that use them. So forward and backward of every stage can be timed
alone, and their sum is a whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_moe.combine.restore import restore_copies
from megatron_moe.dispatch.exchange import exchange
from megatron_moe.dispatch.permute import permute, permute_probs, unpermute
from megatron_moe.dispatch.plan import plan_dispatch
from megatron_moe.tools.bench.clock import Clock

if TYPE_CHECKING:
    from megatron_moe.tools.bench.sides import Sides

PHASES = ("route", "permute", "exchange", "experts", "combine")
Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a layer.

    Args:
        phase: One of :data:`PHASES`, under which its time is booked.
        run: Takes the values so far by name, returns new ones.
    """

    phase: str
    run: Callable[[Values], Values]


def stages_of_ours(layer: Any) -> list[Stage]:
    """Our layer with the all-to-all dispatcher: what ``MoELayer._forward`` calls, one by one."""
    groups = layer.groups

    def route(v: Values) -> Values:
        routing = layer.router(v["x"])
        return {"routing": routing, "probs": routing.probs_TK}

    def to_expert_order(v: Values) -> Values:
        plan = plan_dispatch(v["routing"], groups)
        rows = permute(v["x"].flatten(0, 1), plan.order)
        return {"plan": plan, "rows": rows, "row_probs": permute_probs(v["probs"], plan.order)}

    def send(v: Values) -> Values:
        rows, probs = exchange(v["rows"], v["row_probs"], v["plan"], groups)
        return {"rows": rows, "row_probs": probs}

    def compute(v: Values) -> Values:
        return {"y": layer.experts(v["rows"], v["plan"].tokens_per_expert, v["row_probs"])[0]}

    def send_back(v: Values) -> Values:
        return {"y": restore_copies(v["y"], v["plan"], groups)}

    def to_token_order(v: Values) -> Values:
        return {"y": unpermute(v["y"], v["plan"].order).view_as(v["x"])}

    return [
        Stage("route", route),
        Stage("permute", to_expert_order),
        Stage("exchange", send),
        Stage("experts", compute),
        Stage("exchange", send_back),
        Stage("combine", to_token_order),
    ]


def stages_of_upstream(layer: Any) -> list[Stage]:
    """Upstream's layer, cut where it cuts itself; its second sort counts as exchange, as ours."""
    dispatcher = layer.token_dispatcher

    def route(v: Values) -> Values:
        probs, routing_map = layer.route(v["x"])
        return {"probs": probs, "routing_map": routing_map}

    def to_expert_order(v: Values) -> Values:
        rows, probs = layer.preprocess(v["x"], v["probs"], v["routing_map"])
        return {"rows": rows, "row_probs": probs}

    def send(v: Values) -> Values:
        rows, probs = layer.dispatch(v["rows"], v["row_probs"])
        rows, tokens_per_expert, probs = dispatcher.dispatch_postprocess(rows, probs)
        return {"rows": rows, "row_probs": probs, "tokens_per_expert": tokens_per_expert}

    def compute(v: Values) -> Values:
        return {"y": layer.experts(v["rows"], v["tokens_per_expert"], v["row_probs"])[0]}

    def send_back(v: Values) -> Values:
        return {"y": layer.combine(dispatcher.combine_preprocess(v["y"]))}

    def to_token_order(v: Values) -> Values:
        return {"y": layer.postprocess(v["y"], None)}

    return [
        Stage("route", route),
        Stage("permute", to_expert_order),
        Stage("exchange", send),
        Stage("experts", compute),
        Stage("exchange", send_back),
        Stage("combine", to_token_order),
    ]


def time_phases(sides: Sides, rounds: int, clock: Clock) -> dict[str, dict[str, float]]:
    """Time the phases of upstream and ours, in turns.

    Returns:
        By side and phase, the smallest seconds of forward plus the smallest of backward.
    """
    stages = {
        "upstream": stages_of_upstream(sides.layers["upstream"]),
        "ours": stages_of_ours(sides.layers["ours"]),
    }
    best: dict[str, dict[tuple[int, str], float]] = {name: {} for name in stages}
    for _ in range(rounds):
        for name in stages:
            sides.clear(name)
            for key, seconds in timed_step(stages[name], sides.x_SBD, sides.grad_SBD, clock):
                best[name][key] = min(best[name].get(key, seconds), seconds)
    out = {name: dict.fromkeys(PHASES, 0.0) for name in stages}
    for name in stages:
        for (place, _), seconds in best[name].items():
            out[name][stages[name][place].phase] += seconds
    return out


def timed_step(
    stages: list[Stage], x: Tensor, grad: Tensor, clock: Clock
) -> Iterator[tuple[tuple[int, str], float]]:
    """Run one step stage by stage; yields ``((place, "forward" | "backward"), seconds)``."""
    values: Values = {"x": x}
    made: list[Mapping[str, tuple[Tensor, Tensor]]] = []
    for place, stage in enumerate(stages):
        before = clock()
        new = stage.run(values)
        yield (place, "forward"), clock() - before
        cut = {
            name: (one, one.detach().requires_grad_())
            for name, one in new.items()
            # A stage that hands a value on as it is has no part in the graph.
            if isinstance(one, Tensor) and one.requires_grad and one is not values.get(name)
        }
        made.append(cut)
        values |= new | {name: leaf for name, (_, leaf) in cut.items()}
    values["y"].grad = grad
    for place in reversed(range(len(stages))):
        outputs = [out for out, leaf in made[place].values() if leaf.grad is not None]
        grads = [leaf.grad for _, leaf in made[place].values() if leaf.grad is not None]
        before = clock()
        torch.autograd.backward(outputs, grads)
        yield (place, "backward"), clock() - before
