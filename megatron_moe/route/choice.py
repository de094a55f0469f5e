"""What a choice of experts is, and where a new one is registered.

A choice answers two questions. :meth:`Choice.pick`: which experts, as integers, without gradient,
once for each token. :meth:`Choice.weigh`: with what weight, differentiable, from those integers.
The integers are kept and reused wherever the layer is computed again (activation recompute,
replay), so no near-tie can fall the other way the second time.

A choice of your own needs no change here::

    # my_package/my_choice.py
    from megatron_moe.route.choice import Choice
    from megatron_moe.route.decision import Picked
    from megatron_moe.route.tokens import Tokens

    class EveryOther(Choice):
        def pick(self, tokens: Tokens) -> Picked:
            ...

    megatron-moe run … --moe-router-choice my_package.my_choice:EveryOther
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from megatron_moe.parallel.groups import ExpertGroups
from megatron_moe.route.decision import Picked
from megatron_moe.route.part import RouterPart
from megatron_moe.route.scores import weigh_chosen
from megatron_moe.route.tokens import Tokens


class Choice(RouterPart):
    """How tokens get their experts. Subclasses say :meth:`pick`, and the rest where it differs.

    Args:
        config: Megatron's ``TransformerConfig`` (or what has its attributes).
        moe: The plugin's ``MoEConfig``.
        groups: Process groups of the layer.
    """

    # Whether a later token can change what an earlier one is given: useless for a language model.
    sees_future: ClassVar[bool] = False
    # Megatron's options that have no effect with this choice, and are refused.
    ignores: ClassVar[tuple[str, ...]] = ()
    # Whether evaluation decides about each token by itself.
    decides_alone: ClassVar[bool] = True
    # Whether ``Tokens.bias_TE`` is added to what is ranked.
    ranks_with_bias: ClassVar[bool] = True
    # Choices that balance by themselves refuse balancing losses, which would do nothing.
    balanced: ClassVar[bool] = False

    def __init__(self, config: Any, moe: Any, groups: ExpertGroups) -> None:
        self.config = config
        self.moe = moe
        self.groups = groups
        self.topk: int = config.moe_router_topk
        self.num_experts: int = config.num_moe_experts

    @property
    def mean_k(self) -> float:
        """Choices that a token makes on average: what an even share of an expert is reckoned by."""
        return self.topk

    @property
    def places(self) -> int:
        """Places for choices that a token has: the K of what :meth:`pick` returns."""
        return self.topk

    @classmethod
    def faults(cls, config: Any, moe: Any) -> list[str]:
        """What in the options cannot work with this choice, one sentence each."""
        return []

    def pick(self, tokens: Tokens) -> Picked:
        """Choose. Called without gradient; every rank of the layer calls it together."""
        raise NotImplementedError

    def weigh(self, logits_TE: Tensor, picked: Picked) -> Tensor:
        """Weights of the choices, ``(T, K)``, differentiable."""
        c = self.config
        return weigh_chosen(
            logits_TE,
            picked,
            score_function=c.moe_router_score_function,
            pre_softmax=c.moe_router_pre_softmax,
            scaling_factor=c.moe_router_topk_scaling_factor,
        )


_CHOICES: dict[str, str] = {
    "topk": "megatron_moe.route.choices.topk:TopK",
    "switch": "megatron_moe.route.choices.topk:Switch",
    "gshard": "megatron_moe.route.choices.topk:GShard",
    "expert_choice": "megatron_moe.route.choices.expert_choice:ExpertChoice",
    "sinkhorn": "megatron_moe.route.choices.sinkhorn:Sinkhorn",
    "quantile": "megatron_moe.route.choices.quantile:Quantile",
    "hash": "megatron_moe.route.choices.hashing:Hash",
    "top_p": "megatron_moe.route.choices.adaptive:TopP",
    "threshold": "megatron_moe.route.choices.adaptive:Threshold",
}


def register(name: str) -> Callable[[type[Choice]], type[Choice]]:
    """Give a choice a short name for ``--moe-router-choice``; a decorator."""

    def add(cls: type[Choice]) -> type[Choice]:
        _CHOICES[name] = f"{cls.__module__}:{cls.__qualname__}"
        return cls

    return add


def choice_names() -> list[str]:
    """The names that ``--moe-router-choice`` knows."""
    return sorted(_CHOICES)


def choice_named(name: str) -> type[Choice]:
    """Find a choice by its name, or by ``package.module:Class``.

    Raises:
        ValueError: There is none of that name, or it is no :class:`Choice`.
    """
    found = load_named(name, _CHOICES, "router_choice")
    if not (isinstance(found, type) and issubclass(found, Choice)):
        raise ValueError(f"router_choice {name!r} is not a subclass of megatron_moe's Choice")
    return found


def load_named(name: str, known: dict[str, str], option: str) -> Any:
    """Import what a registered name, or ``package.module:name``, stands for.

    Raises:
        ValueError: Nothing of that name; says what there is.
    """
    path = known.get(name, name)
    module, colon, attribute = path.partition(":")
    if not colon:
        raise ValueError(
            f"{option} ({name}) must be one of {', '.join(sorted(known))}, or package.module:Name"
        )
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as missing:
        raise ValueError(f"{option} ({name}) cannot be imported: {missing}") from missing
    return found


def name_of_choice(config: Any, moe: Any) -> str:
    """The choice that the options ask for; Megatron's own flags name two of them.

    Raises:
        ValueError: Two flags ask for two choices.
    """
    kinds = config.moe_router_load_balancing_type
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    asked = {"sinkhorn": "sinkhorn", "quantile_balancing": "quantile"}
    by_megatron = [asked[kind] for kind in kinds if kind in asked]
    if not by_megatron:
        return moe.router_choice
    if len(kinds) > 1 or moe.router_choice not in ("topk", by_megatron[0]):
        raise ValueError(
            f"moe_router_load_balancing_type ({' '.join(kinds)}) chooses the experts by itself: "
            f"give it alone, and leave router_choice ({moe.router_choice}) at topk"
        )
    return by_megatron[0]
