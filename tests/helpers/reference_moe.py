"""A mixture of experts as a loop over tokens and experts: slow, obvious, the oracle of everything.

Torch only, any dtype (fp64 for tight comparisons), differentiable. Shapes: T tokens, D hidden,
F expert hidden, E experts, K choices a token, B sequences (token t belongs to sequence t mod B).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class ReferenceRouter:
    """Options of the choice, named after Megatron's without the ``moe_router_`` prefix."""

    topk: int
    score_function: str = "softmax"
    pre_softmax: bool = False
    num_groups: int | None = None
    group_topk: int | None = None
    scaling_factor: float | None = None
    expert_bias_E: Tensor | None = None
    capacity_factor: float | None = None
    drop_policy: str = "probs"


@dataclass(frozen=True, kw_only=True)
class ReferenceExperts:
    """Weights in ``torch.nn.functional.linear``'s layout; ``fc1`` is ``(E, 2F, D)`` when gated."""

    fc1: Tensor
    fc2: Tensor
    bias1: Tensor | None = None
    bias2: Tensor | None = None
    gated: bool = False
    activation: Callable[[Tensor], Tensor] = F.silu


@dataclass(frozen=True)
class ReferenceResult:
    """What a layer gives for one micro-batch.

    Args:
        output: ``(T, D)``.
        probs: Weights of the choices carried out, zero elsewhere, ``(T, E)``.
        routing_map: Choices carried out, ``(T, E)`` bool.
        chosen: Choices before capacity: what the balancing losses count, ``(T, E)`` bool.
        aux_loss: E · Σ_e f_e · P_e over the micro-batch's valid tokens.
        seq_aux_loss: The same for each sequence, averaged over the B sequences.
        z_loss: Mean of logsumexp² over the valid tokens.
    """

    output: Tensor
    probs: Tensor
    routing_map: Tensor
    chosen: Tensor
    aux_loss: Tensor
    seq_aux_loss: Tensor
    z_loss: Tensor


def reference_moe(
    hidden: Tensor,
    router_weight: Tensor,
    experts: ReferenceExperts,
    options: ReferenceRouter,
    *,
    padding: Tensor | None = None,
    num_sequences: int = 1,
) -> ReferenceResult:
    """Run the layer.

    Args:
        hidden: ``(T, D)``.
        router_weight: ``(E, D)``.
        experts: The experts' weights.
        options: How the router chooses.
        padding: True for tokens that are in no count, capacity or loss, ``(T,)``.
        num_sequences: B, for the sequence-wise loss.
    """
    logits = hidden @ router_weight.T
    valid = [True] * len(hidden) if padding is None else [not p for p in padding.tolist()]
    probs, chosen = choose(logits, options, valid)
    routing_map = keep_within_capacity(probs, chosen, options)
    output = torch.zeros_like(hidden)
    for token, expert in routing_map.nonzero().tolist():
        weighted = probs[token, expert] * one_expert(hidden[token], experts, expert)
        output[token] = output[token] + weighted
    scores = balance_scores(logits, options.score_function)
    tokens = [t for t in range(len(hidden)) if valid[t]]
    sequences = [[t for t in tokens if t % num_sequences == b] for b in range(num_sequences)]
    seq_losses = [balance_loss(scores[s], chosen[s], options.topk) for s in sequences]
    return ReferenceResult(
        output=output,
        probs=probs * routing_map,
        routing_map=routing_map,
        chosen=chosen,
        aux_loss=balance_loss(scores[tokens], chosen[tokens], options.topk),
        seq_aux_loss=sum(seq_losses) / num_sequences,
        z_loss=logits[tokens].logsumexp(-1).square().sum() / max(len(tokens), 1),
    )


def choose(logits: Tensor, options: ReferenceRouter, valid: list[bool]) -> tuple[Tensor, Tensor]:
    """Return weights and choices, both ``(T, E)``; a lower index wins a tie."""
    rows, chosen = [], torch.zeros_like(logits, dtype=torch.bool)
    for token, row in enumerate(logits):
        scores = _scores(row, options)
        best = _best(scores, options)
        picked = scores[best]
        if options.score_function == "softmax" and not options.pre_softmax:
            picked = torch.softmax(picked, dim=0)
        elif options.score_function != "softmax" and options.topk > 1:
            picked = picked / (picked.sum() + 1e-20)
        if options.scaling_factor:
            picked = picked * options.scaling_factor
        rows.append(torch.zeros_like(row).index_put((torch.tensor(best),), picked))
        chosen[token, best] = valid[token]
    probs = torch.stack(rows) if rows else torch.zeros_like(logits)
    return probs * chosen, chosen


def _scores(row: Tensor, options: ReferenceRouter) -> Tensor:
    if options.score_function == "softmax":
        return torch.softmax(row, dim=0) if options.pre_softmax else row
    return torch.sigmoid(row) if options.score_function == "sigmoid" else F.softplus(row).sqrt()


def _best(scores: Tensor, options: ReferenceRouter) -> list[int]:
    ranked = scores.detach()
    if options.expert_bias_E is not None:
        ranked = ranked + options.expert_bias_E
    values = ranked.tolist()
    allowed = list(range(len(values)))
    if options.group_topk:
        assert options.num_groups is not None
        size = len(values) // options.num_groups
        groups = [allowed[i : i + size] for i in range(0, len(values), size)]
        per_group = options.topk // options.group_topk
        merit = [sum(sorted((values[e] for e in g), reverse=True)[:per_group]) for g in groups]
        best_groups = sorted(range(len(groups)), key=lambda g: -merit[g])[: options.group_topk]
        allowed = [e for g in sorted(best_groups) for e in groups[g]]
    return sorted(allowed, key=lambda e: -values[e])[: options.topk]


def keep_within_capacity(probs: Tensor, chosen: Tensor, options: ReferenceRouter) -> Tensor:
    """Return the choices that each expert has room for, ``(T, E)`` bool.

    An expert takes ``⌈factor · T · K / E⌉`` tokens: the heaviest (``probs``) or the first
    (``position``); the earlier token wins a tie.
    """
    if options.capacity_factor is None:
        return chosen
    num_tokens, num_experts = chosen.shape
    capacity = math.ceil(num_tokens * options.topk / num_experts * options.capacity_factor)
    kept = torch.zeros_like(chosen)
    for expert in range(num_experts):
        queue = chosen[:, expert].nonzero().flatten().tolist()
        if options.drop_policy == "probs":
            weights = probs[:, expert].tolist()
            queue.sort(key=lambda t: -weights[t])
        kept[queue[:capacity], expert] = True
    return kept


def one_expert(x: Tensor, experts: ReferenceExperts, expert: int) -> Tensor:
    """Return the output of one expert for one token, ``(D,)``."""
    bias1 = None if experts.bias1 is None else experts.bias1[expert]
    bias2 = None if experts.bias2 is None else experts.bias2[expert]
    inner = F.linear(x, experts.fc1[expert], bias1)
    if experts.gated:
        gate, up = inner.chunk(2)
        inner = experts.activation(gate) * up
    else:
        inner = experts.activation(inner)
    return F.linear(inner, experts.fc2[expert], bias2)


def balance_scores(logits: Tensor, score_function: str) -> Tensor:
    """Return scores over all experts that sum to 1 for each token, ``(T, E)``."""
    if score_function == "softmax":
        return torch.softmax(logits, dim=-1)
    raw = torch.sigmoid(logits) if score_function == "sigmoid" else F.softplus(logits).sqrt()
    return raw / raw.sum(dim=-1, keepdim=True)


def balance_loss(scores: Tensor, chosen: Tensor, topk: int) -> Tensor:
    """Return E · Σ_e f_e · P_e, where f_e = share of the choices, P_e = mean score; 0 if no token.

    Args:
        scores: Of the n valid tokens, ``(n, E)``.
        chosen: Their choices, ``(n, E)`` bool.
        topk: K.
    """
    num_tokens, num_experts = scores.shape
    total = scores.new_zeros(())
    for expert in range(num_experts if num_tokens else 0):
        share = int(chosen[:, expert].sum()) / (topk * num_tokens)
        total = total + share * scores[:, expert].mean()
    return num_experts * total
