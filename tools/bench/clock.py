"""Clocks, and fair turns on a shared machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

Clock = Callable[[], float]


def clock_for(threads: int) -> Clock:
    """CPU time of this process on one thread, which other processes hardly disturb; else wall."""
    return time.process_time if threads == 1 else time.perf_counter


def fastest_in_turns(
    steps: Mapping[str, Callable[[], None]], rounds: int, clock: Clock
) -> dict[str, float]:
    """Run all steps ``rounds`` times, one after another within a round.

    A disturbance that lasts longer than one step then falls on all of them, and the minimum is of
    undisturbed rounds.

    Returns:
        The smallest seconds of each step.
    """
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            before = clock()
            step()
            best[name] = min(best[name], clock() - before)
    return best
