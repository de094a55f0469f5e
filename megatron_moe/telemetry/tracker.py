"""Our figures in Megatron's own log: a tracker that reports them beside Megatron's losses.

Megatron's loop asks the tracker for a fixed list of names and forgets all others. So the tracker in
force is replaced by one that adds ours. Which names a run has follows from its options alone, since
every pipeline stage must report the same ones, also one without experts.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_logging import (
    MoEMetricsTracker,
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)

from megatron_moe.route.balance import balance_losses
from megatron_moe.route.choice import choice_named, name_of_choice

DROP_RATE = "expert_drop_rate"
MEAN_K = "experts_per_token"
CHURN = "router_churn"
CONTEXT_CHURN = "context_churn"
CACHE_HITS = "expert_cache_hits"


class RoutingTracker(MoEMetricsTracker):
    """Megatron's tracker, with more names.

    Args:
        names: What is reported besides what Megatron asks for.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names

    def report(self, *args: Any, track_names: Any = None, **kwargs: Any) -> str:
        """As Megatron's, for our names too."""
        if track_names is not None:
            asked = [track_names] if isinstance(track_names, str) else list(track_names)
            track_names = [*asked, *(name for name in self.names if name not in asked)]
        return super().report(*args, track_names=track_names, **kwargs)


def install_tracker(config: Any, moe: Any) -> None:
    """Put our tracker in force; every pipeline stage calls this before the first step."""
    names = names_of(config, moe)
    present = get_moe_metrics_tracker()
    if names and not (isinstance(present, RoutingTracker) and present.names == names):
        set_moe_metrics_tracker(RoutingTracker(names))


def names_of(config: Any, moe: Any) -> tuple[str, ...]:
    """What a run with these options reports besides Megatron's own losses."""
    ours = {
        "router_budget_loss": _is_adaptive(config, moe) and bool(moe.budget_loss_coeff),
        "gate_distill_loss": bool(moe.gate_pretrain_iters and moe.gate_distill_coeff),
        DROP_RATE: config.moe_expert_capacity_factor is not None,
        MEAN_K: _is_adaptive(config, moe),
        CHURN: bool(moe.probe_tokens),
        CONTEXT_CHURN: bool(moe.hysteresis_margin),
        CACHE_HITS: moe.expert_offload != "none",
    }
    megatrons = ("load_balancing_loss", "seq_load_balancing_loss", "global_load_balancing_loss")
    losses = [x.log_name for x in balance_losses(config, moe) if x.log_name not in megatrons]
    return (*dict.fromkeys(losses), *(name for name, wanted in ours.items() if wanted))


def record(router: Any, name: str, value: float) -> None:
    """Book a figure that all ranks share: the sum over a step divided by its micro-batches."""
    c = router.config
    get_moe_metrics_tracker().record(
        name,
        router.weight.new_tensor(value, dtype=torch.float32),
        router.layer_place,
        c.num_layers + (c.mtp_num_layers or 0),
        avg_group=router.groups.tp_dp_cp,
    )


def _is_adaptive(config: Any, moe: Any) -> bool:
    from megatron_moe.route.choices.adaptive import Adaptive

    choice = choice_named(name_of_choice(config, moe))
    return issubclass(choice, Adaptive) and moe.target_k >= 0
