"""Hooks on a model's routers: what they decide, and how it differs from the decision before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_moe.route.hysteresis import hash_contexts
from megatron_moe.tools.study.measures import churn

CONTEXT_TOKENS = 4
_SLOTS = 2**16


class ContextChurn:
    """How often another expert is chosen where the same tokens were read before.

    A context is a token with the three before it; the last decision in each is remembered, until
    another context falls on the same slot.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self._tags = torch.zeros(_SLOTS, dtype=torch.int64)  # no context hashes to 0
        self._known_E = torch.zeros(_SLOTS, num_experts, dtype=torch.bool)
        self._changed = self._choices = 0

    def add(self, contexts_T: Tensor, now_TE: Tensor) -> None:
        """Compare decisions with those remembered, then remember them.

        Args:
            contexts_T: Hash of each token's context, ``(T,)`` int64.
            now_TE: Which experts it goes to, ``(T, E)`` bool.
        """
        slots_T = contexts_T & (_SLOTS - 1)
        again_T = self._tags[slots_T] == contexts_T
        before_TE = self._known_E[slots_T]
        self._changed += int((before_TE ^ now_TE)[again_T].sum())
        self._choices += int(before_TE[again_T].sum()) + int(now_TE[again_T].sum())
        places_T = torch.arange(len(slots_T))
        last = torch.full((_SLOTS,), -1).scatter_reduce(0, slots_T, places_T, "amax")
        wins_T = last[slots_T] == places_T  # the last of a slot, whatever the order of writes
        self._tags[slots_T[wins_T]] = contexts_T[wins_T]
        self._known_E[slots_T[wins_T]] = now_TE[wins_T]

    def take(self) -> float | None:
        """Share of the choices that changed since the last call; None without a repetition."""
        share = self._changed / self._choices if self._choices else None
        self._changed = self._choices = 0
        return share


class RouterWatch:
    """Sees every decision: of training for repeated contexts, of evaluation as a probe.

    Args:
        model: A module that is called with the token ids, ``(B, S)``, first.
        routers: Its routers, which return a ``Routing``.
        num_experts: E.
    """

    def __init__(self, model: nn.Module, routers: list[Any], num_experts: int) -> None:
        self._contexts_T: Tensor
        self._contexts = [ContextChurn(num_experts) for _ in routers]
        self._seen: list[list[Tensor]] = [[] for _ in routers]
        self._probed: list[Tensor] | None = None
        model.register_forward_pre_hook(self._note)
        for place, router in enumerate(routers):
            router.register_forward_hook(self._decided(place))

    def probe_churn(self) -> float | None:
        """Share of choices that differ from the last call's, on the tokens evaluated in between.

        Both times the same tokens must have been evaluated. None at the first call.
        """
        now, before = [torch.cat(maps) for maps in self._seen], self._probed
        self._seen, self._probed = [[] for _ in self._seen], now
        if before is None:
            return None
        return _mean([churn(b, n) for b, n in zip(before, now, strict=True)])

    def context_churn(self) -> float | None:
        """Share of training's choices that differ from the last ones in the same context."""
        shares = [layer.take() for layer in self._contexts]
        return _mean([share for share in shares if share is not None])

    def _note(self, _model: Any, args: tuple[Any, ...]) -> None:
        # Routers see tokens in sequence-major order.
        self._contexts_T = hash_contexts(args[0], CONTEXT_TOKENS).t().flatten()

    def _decided(self, place: int) -> Callable[..., None]:
        def hook(router: Any, _inputs: Any, routing: Any) -> None:
            now_TE = routing.dense()[1]
            if router.training:
                self._contexts[place].add(self._contexts_T, now_TE)
            else:
                self._seen[place].append(now_TE)

        return hook


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
