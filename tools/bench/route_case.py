"""What the router benchmark measures: sizes, kinds of routing, goals."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

AUX_COEFF = 1e-2
Z_COEFF = 1e-3
TOKENS = (4096, 32768)
TOPK = {8: 2, 64: 8, 256: 8}  # by number of experts
KINDS = {
    "topk": "softmax, balancing loss and z-loss",
    "bias": "sigmoid, expert bias, z-loss",
    "groups": "sigmoid, group-limited, z-loss",
}
# Speed relative to the other side that ours should reach.
GOALS = {"naive": 8.0, "upstream": 1.0}
SIDES = ("naive", "upstream", "ours", "ours, by expert")
# By whom ours is compared with whom: the naive loop ends with tokens in expert order.
AGAINST = {"naive": "ours, by expert", "upstream": "ours"}
PARTS = ("whole", "without gate")


@dataclass(frozen=True, slots=True)
class RouteCase:
    """One router and its tokens.

    The balancing loss is on for ``topk`` alone: with a bias or groups upstream computes it over
    choices that it does not dispatch, so no two results could be compared.

    Args:
        kind: One of :data:`KINDS`.
        tokens: T.
        experts: E.
        topk: K.
        hidden: D.
    """

    kind: str
    tokens: int
    experts: int
    topk: int
    hidden: int = 1024

    @property
    def name(self) -> str:
        """How it is shown."""
        return f"{self.experts} experts, top-{self.topk}, {self.tokens:,} tokens"

    @property
    def score_function(self) -> str:
        """Megatron's name."""
        return "softmax" if self.kind == "topk" else "sigmoid"

    @property
    def balanced_by_loss(self) -> bool:
        """Whether there is a balancing loss."""
        return self.kind == "topk"

    @property
    def biased(self) -> bool:
        """Whether there is an expert bias."""
        return self.kind == "bias"

    @property
    def num_groups(self) -> int | None:
        """G."""
        if self.kind != "groups":
            return None
        return min(8, self.experts // 2)

    @property
    def group_topk(self) -> int | None:
        """Groups that a token may use."""
        return None if self.num_groups is None else self.num_groups // 2


@dataclass(frozen=True, slots=True)
class RouteJob:
    """What one process measures.

    Args:
        cases: One after another.
        rounds: Of which the fastest counts; half as many for the many tokens.
    """

    cases: list[RouteCase]
    rounds: int

    def rounds_of(self, case: RouteCase) -> int:
        """How often a case is repeated."""
        return self.rounds if case.tokens <= min(TOKENS) else (self.rounds + 1) // 2

    def as_json(self) -> dict[str, Any]:
        """For the process that measures."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> RouteJob:
        """What :meth:`as_json` gave."""
        return cls([RouteCase(**case) for case in found["cases"]], found["rounds"])
