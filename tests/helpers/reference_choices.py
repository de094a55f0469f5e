"""Every choice of experts as loops over tokens and experts, in Python's own floats.

Slow and obvious. Logits come as ``(T, E)`` tensors, results as lists by token. Where values are
equal, the earlier token and the lower expert win.
"""

import math

from torch import Tensor

Chosen = list[list[int]]  # the experts of each token
Weights = list[dict[int, float]]  # of each token, by expert


def softmax(row: list[float]) -> list[float]:
    """Exponentials over their sum."""
    most = max(row)
    powers = [math.exp(x - most) for x in row]
    return [p / sum(powers) for p in powers]


def balance_scores(logits: Tensor, score_function: str = "softmax") -> list[list[float]]:
    """Scores of each token that sum to 1 over the experts."""
    if score_function == "softmax":
        return [softmax(row) for row in logits.tolist()]
    raw = {
        "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
        "sqrtsoftplus": lambda x: math.sqrt(math.log1p(math.exp(x))),
    }[score_function]
    scores = [[raw(x) for x in row] for row in logits.tolist()]
    return [[s / sum(row) for s in row] for row in scores]


def best_first(values: list[float]) -> list[int]:
    """Places of the values, the largest first."""
    return sorted(range(len(values)), key=lambda e: -values[e])


def switch(logits: Tensor) -> tuple[Chosen, Weights]:
    """One expert, weighted by its score."""
    chosen, weights = [], []
    for scores in balance_scores(logits):
        best = best_first(scores)[0]
        chosen.append([best])
        weights.append({best: scores[best]})
    return chosen, weights


def gshard(logits: Tensor, score_function: str = "softmax") -> tuple[Chosen, Weights]:
    """Two experts, with their scores divided by the sum of both."""
    chosen, weights = [], []
    for scores in balance_scores(logits, score_function):
        best = best_first(scores)[:2]
        both = sum(scores[e] for e in best)
        chosen.append(best)
        weights.append({e: scores[e] / both for e in best})
    return chosen, weights


def expert_choice(
    logits: Tensor, topk: int, valid: list[bool], num_sequences: int | None = None
) -> Chosen:
    """Each expert takes its best ``⌈n · K / E⌉`` of the valid tokens, of each sequence if told.

    Args:
        logits: ``(T, E)``.
        topk: K.
        valid: False for padding.
        num_sequences: B, if the tokens of each sequence compete among themselves.
    """
    scores = balance_scores(logits)
    num_tokens, num_experts = logits.shape
    columns = num_sequences or 1
    chosen: Chosen = [[] for _ in range(num_tokens)]
    for column in range(columns):
        members = [t for t in range(num_tokens) if t % columns == column and valid[t]]
        share = min(math.ceil(len(members) * topk / num_experts), len(members))
        for expert in range(num_experts):
            queue = sorted(members, key=lambda t, e=expert: -scores[t][e])
            for token in queue[:share]:
                chosen[token].append(expert)
    return chosen


def sinkhorn(logits: Tensor, topk: int, iterations: int, valid: list[bool]) -> Chosen:
    """The K largest of each row of ``exp(logits)``, columns scaled until all loads are alike.

    The plain iteration with products: for small logits only.
    """
    num_tokens, num_experts = logits.shape
    powers = [[math.exp(x) for x in row] for row in logits.tolist()]
    tokens = [t for t in range(num_tokens) if valid[t]]
    columns = [1.0] * num_experts
    for _ in range(iterations if tokens else 0):
        rows = {t: 1 / sum(powers[t][e] * columns[e] for e in range(num_experts)) for t in tokens}
        share = len(tokens) / num_experts
        columns = [share / sum(powers[t][e] * rows[t] for t in tokens) for e in range(num_experts)]
    return [best_first([row[e] * columns[e] for e in range(num_experts)])[:topk] for row in powers]


def quantile_thresholds(logits: Tensor, topk: int, beta: list[float]) -> list[float]:
    """The value above a token's first loser that just an expert's share of tokens pass."""
    rows = logits.tolist()
    losers = [sorted((x - b for x, b in zip(row, beta, strict=True)))[-topk - 1] for row in rows]
    num_tokens, num_experts = logits.shape
    share = min(math.ceil(num_tokens * topk / num_experts), num_tokens - 1)
    found = []
    for expert in range(num_experts):
        passing = sorted((rows[t][expert] - losers[t] for t in range(num_tokens)), reverse=True)
        found.append(passing[share])
    return found


def top_p(logits: Tensor, p: float, k_min: int, k_max: int) -> Chosen:
    """The fewest experts whose scores reach p, within the bounds."""
    chosen = []
    for scores in balance_scores(logits):
        order, taken, mass = best_first(scores), 0, 0.0
        while taken < k_max and (taken < k_min or mass < p):
            mass += scores[order[taken]]
            taken += 1
        chosen.append(order[:taken])
    return chosen


def threshold(logits: Tensor, least: float, k_min: int, k_max: int) -> Chosen:
    """All experts with a score above the threshold, within the bounds."""
    chosen = []
    for scores in balance_scores(logits):
        order = best_first(scores)
        above = sum(score > least for score in scores)
        chosen.append(order[: min(max(above, k_min), k_max)])
    return chosen


def hashed(token_ids: list[int], num_experts: int, topk: int) -> list[set[int]]:
    """The K experts for which splitmix64's finaliser of (id · E + expert) ends highest."""
    found = []
    for token in token_ids:
        ends = [_mix(token * num_experts + e) & 0xFFFFFF for e in range(num_experts)]
        found.append(set(best_first([float(x) for x in ends])[:topk]))
    return found


def _mix(x: int) -> int:
    mask = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def within_capacity(
    indices: list[list[int]],
    weights: list[list[float]],
    chosen: list[list[bool]],
    capacity: int,
    policy: str,
) -> list[list[bool]]:
    """Which choices an expert has room for; all lists are by token, then by place.

    Args:
        indices: Experts.
        weights: Their weights.
        chosen: False where there is no choice.
        capacity: Tokens that an expert takes.
        policy: ``probs``, ``position`` or ``prioritised``.
    """

    def rank(choice: tuple[int, int]) -> tuple:
        token, place = choice
        if policy == "probs":
            return (-weights[token][place], token, place)
        if policy == "position":
            return (token, place)
        return (place, -max(weights[token]), token)

    kept = [[False] * len(row) for row in indices]
    experts = {e for row in indices for e in row}
    for expert in experts:
        queue = [
            (t, k)
            for t, row in enumerate(indices)
            for k, e in enumerate(row)
            if e == expert and chosen[t][k]
        ]
        for token, place in sorted(queue, key=rank)[:capacity]:
            kept[token][place] = True
    return kept


def kl_loss(scores: list[list[float]]) -> float:
    """Divergence of the mean score from the uniform one, in nats; 0 without tokens."""
    if not scores:
        return 0.0
    num_experts = len(scores[0])
    total = 0.0
    for expert in range(num_experts):
        mean = sum(row[expert] for row in scores) / len(scores)
        total += mean * math.log(num_experts * mean) if mean else 0.0
    return total


def budget_loss(chosen: Chosen, target: float) -> float:
    """Square of how far, relatively, the mean number of experts is from its target."""
    mean = sum(len(experts) for experts in chosen) / len(chosen)
    return (mean / target - 1) ** 2
