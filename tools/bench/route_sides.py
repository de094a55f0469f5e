"""Three routers with the same weights in one process: naive, upstream's, ours.

A step is one forward and backward that ends where a dispatcher can start. Upstream's dispatcher
starts from dense ``probs`` and ``routing_map`` ``(T, E)`` and sums the map over tokens; ours from a
``Routing`` of indices and weights ``(T, K)`` and its ``tokens_per_expert``. The naive loop lists
tokens and weights by expert, which with us is the dispatcher's first act: against it ours is timed
with the order of copies by expert and the weights in that order, as ``ours, by expert``.

The gradient that comes back is the same for every choice on all sides, on top of which each side's
losses put theirs. Imports Megatron: only for processes in which the CPU backend is active.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter as MegatronRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_moe.dispatch.plan import copy_order
from megatron_moe.route.router import TopKRouter
from megatron_moe.tools.bench.route_case import AUX_COEFF, Z_COEFF, RouteCase
from megatron_moe.tools.bench.route_naive import naive_route


@dataclass(frozen=True, slots=True)
class Ended:
    """Where a forward ends.

    Args:
        choices: Gives token and expert of each choice in the order of the weights, ``(N,)`` each;
            None where the weights are dense. Not called while the clock runs.
        weights: ``(T, E)`` where dense, else one tensor or several, ``N`` weights altogether.
        counts_E: Choices of each expert.
        loss: What is left to add to the loss; None where losses hang on the weights.
    """

    choices: Callable[[], tuple[Tensor, Tensor]] | None
    weights: list[Tensor]
    counts_E: Tensor
    loss: Tensor | None = None

    def gradients(self, grad_TE: Tensor) -> list[Tensor]:
        """The dense gradient, in the form of the weights."""
        if self.choices is None:
            return [grad_TE]
        sizes = [weight.numel() for weight in self.weights]
        pieces = grad_TE[self.choices()].split(sizes)
        return [g.view_as(w) for g, w in zip(pieces, self.weights, strict=True)]

    def dense(self, shape: torch.Size) -> Tensor:
        """Weights as ``(T, E)``, zero where not chosen."""
        if self.choices is None:
            return self.weights[0].detach()
        dense_TE = torch.zeros(shape)
        dense_TE[self.choices()] = torch.cat([w.detach().flatten() for w in self.weights])
        return dense_TE


class Routers:
    """The sides of a case, by name, as functions from input to :class:`Ended`.

    Args:
        case: What is measured.
        gated: With the gate, from hidden states ``(T, 1, D)``; else from its logits ``(T, 1, E)``.
    """

    def __init__(self, case: RouteCase, *, gated: bool) -> None:
        self.case = case
        config, groups = router_config(case), get_default_pg_collection()
        torch.manual_seed(1)
        upstream = MegatronRouter(config, pg_collection=groups)
        ours = TopKRouter(config, pg_collection=groups)
        torch.nn.init.normal_(upstream.weight, std=0.02)
        if upstream.expert_bias is not None:
            torch.nn.init.normal_(upstream.expert_bias, std=0.02)
        ours.load_state_dict(upstream.state_dict(), strict=False)
        self.routers: dict[str, Any] = {"upstream": upstream, "ours": ours}
        for router in self.routers.values():
            router.set_layer_number(1)
            router.train()
        x_TD = torch.randn(case.tokens, 1, case.hidden)
        self.input = x_TD if gated else upstream.gating(x_TD).detach()
        self.input.requires_grad_()
        self.grad_TE = torch.randn(case.tokens, case.experts)
        if not gated:
            for router in self.routers.values():
                router.gating = lambda logits: logits
        self.forward: dict[str, Callable[[], Ended]] = {
            "naive": self._naive,
            "upstream": self._upstream,
            "ours": self._ours,
            "ours, by expert": self._ours_by_expert,
        }

    def step(self, name: str, grad_TE: Tensor | None = None) -> Callable[[], None]:
        """One forward and backward of a side.

        Args:
            name: Of the side.
            grad_TE: What comes back for each weight instead of the usual; laid out untimed.
        """
        forward = self.forward[name]
        grads: list[Any] = list(forward().gradients(self.grad_TE if grad_TE is None else grad_TE))

        def run() -> None:
            self.clear()
            ended = forward()
            if ended.loss is None:
                torch.autograd.backward(ended.weights, grads)
            else:
                torch.autograd.backward([*ended.weights, ended.loss], [*grads, None])

        return run

    def gate_gradient(self, name: str) -> Tensor | None:
        """What the last step of a side gave its gate's weights; None without the gate."""
        router = self.routers["ours" if name.startswith("ours") else "upstream"]
        return router.weight.grad

    def clear(self) -> None:
        """Forget gradients."""
        self.input.grad = None
        for router in self.routers.values():
            router.weight.grad = None

    def gate(self) -> None:
        """The gate's share of a step."""
        self.clear()
        logits_TE = self.routers["upstream"].gating(self.input)
        logits_TE.backward(self.grad_TE.view_as(logits_TE))

    def _naive(self) -> Ended:
        c, router = self.case, self.routers["upstream"]
        logits_TE = router.gating(self.input).flatten(0, 1)
        found = naive_route(
            logits_TE,
            c.topk,
            score_function=c.score_function,
            aux_coeff=AUX_COEFF if c.balanced_by_loss else 0.0,
            z_coeff=Z_COEFF,
            bias_E=router.expert_bias,
            num_groups=c.num_groups,
            group_topk=c.group_topk,
        )

        def choices() -> tuple[Tensor, Tensor]:
            return torch.cat(found.tokens), torch.repeat_interleave(found.counts_E)

        return Ended(choices, found.weights, found.counts_E, found.loss)

    def _upstream(self) -> Ended:
        probs_TE, routing_map_TE = self.routers["upstream"](self.input)
        return Ended(None, [probs_TE], routing_map_TE.sum(dim=0))

    def _ours(self) -> Ended:
        routing = self.routers["ours"](self.input)

        def choices() -> tuple[Tensor, Tensor]:
            tokens_T = torch.arange(self.case.tokens)
            return tokens_T.repeat_interleave(self.case.topk), routing.indices_TK.flatten()

        return Ended(choices, [routing.probs_TK], routing.tokens_per_expert())

    def _ours_by_expert(self) -> Ended:
        routing = self.routers["ours"](self.input)
        counts_E = routing.tokens_per_expert()
        order = copy_order(routing, routing.indices_TK.numel())
        weights_N = routing.probs_TK.flatten()[order.choice_N]

        def choices() -> tuple[Tensor, Tensor]:
            return order.token_N, torch.repeat_interleave(counts_E)

        return Ended(choices, [weights_N], counts_E)


def router_config(case: RouteCase) -> TransformerConfig:
    """Megatron's configuration of the routers of a case."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=case.hidden,
        num_attention_heads=4,
        num_moe_experts=case.experts,
        moe_router_topk=case.topk,
        moe_ffn_hidden_size=64,
        moe_router_load_balancing_type="aux_loss" if case.balanced_by_loss else "none",
        moe_aux_loss_coeff=AUX_COEFF if case.balanced_by_loss else 0.0,
        moe_z_loss_coeff=Z_COEFF,
        moe_router_score_function=case.score_function,
        moe_router_enable_expert_bias=case.biased,
        moe_router_num_groups=case.num_groups,
        moe_router_group_topk=case.group_topk,
        moe_router_dtype="fp32",
        add_bias_linear=False,
        use_cpu_initialization=True,
    )
