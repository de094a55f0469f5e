"""Weights that must not learn for a while, whatever optimizer Megatron has built.

A gradient of zero does not hold a weight: weight decay moves it, and so does momentum. Megatron's
parameter groups are fixed when the optimizer is built, and cutting them up would change its
checkpoints. So the few things to do stand around the step of torch's optimizers, of which
Transformer Engine's and Apex's are subclasses:

* while only the routers learn, there is no weight decay; all other gradients are zero, and their
  moments are zero from the start, so Adam moves nothing else;
* when that phase is over, moments and step counts start anew, as in a fresh run;
* a frozen router's weights are put back after the step.

Of a model whose pipeline stage has no router, nothing is held: refused when it is built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "step")


class Hold:
    """What to hold in the next optimizer step; one for the process."""

    def __init__(self) -> None:
        self._hooked = False
        self._routers: list[Any] = []
        self._learning: set[int] = set()
        self._gate_only = self._starts_anew = False
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._decays: list[tuple[dict[str, Any], Any]] = []

    def next_step(self, routers: list[Any]) -> None:
        """Say what to hold in the optimizer step that follows.

        Args:
            routers: Those of this pipeline stage, before their global batch has ended.
        """
        schedules = [router.schedule for router in routers if router.schedule.needed]
        self._gate_only = any(s.gate_only for s in schedules)
        self._starts_anew = any(0 < s.pretrain_iters == s.finished for s in schedules)
        self._routers = [router for router in routers if router.schedule.frozen]
        if schedules and not self._hooked:
            register_optimizer_step_pre_hook(self._before)
            register_optimizer_step_post_hook(self._after)
            self._hooked = True
        learning = routers if self._gate_only else []
        self._learning = {id(p) for router in learning for p in router.parameters()}

    def zero_gradients(self, model: Any) -> None:
        """Take the gradients of what is held, once they are final.

        Args:
            model: Megatron's list of model chunks.
        """
        if self._gate_only:
            everything = (p for chunk in model for p in chunk.parameters())
            _zero_gradients(p for p in everything if id(p) not in self._learning)
        _zero_gradients(p for router in self._routers for p in router.parameters())

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        if self._starts_anew:
            _forget_moments(optimizer)
        if self._gate_only:
            self._decays = [(g, g.get("weight_decay", 0.0)) for g in optimizer.param_groups]
            for group, _decay in self._decays:
                group["weight_decay"] = 0.0
        held = [p for router in self._routers for p in router.parameters()]
        stepped = (p for group in optimizer.param_groups for p in group["params"])
        self._kept = [(p, p.detach().clone()) for p in stepped if any(_is_of(p, h) for h in held)]

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        for group, decay in self._decays:
            group["weight_decay"] = decay
        for main, before in self._kept:
            with torch.no_grad():
                main.copy_(before)
        self._decays, self._kept = [], []


HOLD = Hold()


def _is_of(stepped: Tensor, parameter: Any) -> bool:
    """Whether what an optimizer steps is a parameter, or Megatron's stand-in for one.

    The stand-in is an fp32 copy, or a shard of it, which the parameter knows; or, of fp32
    parameters under the distributed optimizer, a part of the parameter's own memory.
    """
    if stepped is parameter or stepped is getattr(parameter, "main_param", None):
        return True
    first = parameter.data_ptr()
    return first <= stepped.data_ptr() < first + parameter.nbytes


def _zero_gradients(parameters: Any) -> None:
    for parameter in parameters:
        grad = getattr(parameter, "main_grad", None)
        grad = parameter.grad if grad is None else grad
        if grad is not None:
            grad.zero_()


def _forget_moments(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        for name in _MOMENTS:
            value = state.get(name)
            if isinstance(value, Tensor):
                value.zero_()
            elif value is not None:
                state[name] = 0
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = group["step"] * 0
