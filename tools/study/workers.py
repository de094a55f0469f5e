"""Runs shared out to processes that were forked with Megatron in memory."""

from __future__ import annotations

import logging
import os
import queue
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from megatron_moe.tools.study.history import Run
from megatron_moe.tools.study.plan import Plan
from megatron_moe.tools.study.text import Text
from megatron_moe.tools.study.variants import Variant

_STEPS_BETWEEN_REPORTS = 10
_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Job:
    """A run to be made."""

    variant: Variant
    seed: int


@dataclass(frozen=True)
class Steps:
    """A worker tells that it made so many more steps."""

    count: int


@dataclass(frozen=True)
class _Shared:
    plan: Plan
    text: Text
    reports: Any  # multiprocessing's queue
    stop: Any  # multiprocessing's event
    parent: int


_shared: _Shared | None = None  # of this worker; set once, when it starts


class StoppedError(Exception):
    """The parent wants no more of this run."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Megatron's notes on how it is built out of the study's few lines; forks inherit it."""
    loggers = [logging.getLogger(name) for name in ("megatron", "megatron_moe", "matplotlib")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def run_all(jobs: Sequence[Job], plan: Plan, text: Text, num_workers: int) -> Iterator[Steps | Run]:
    """Make all runs; give steps as they are done and runs as they end, in any order.

    A run that fails ends the others and raises its error here, and so does leaving this iterator.
    """
    fork = get_context("fork")  # importing Megatron again in each worker would take 15 s
    shared = _Shared(plan, text, fork.Queue(), fork.Event(), os.getpid())
    executor = ProcessPoolExecutor(num_workers, fork, _enter, (shared,))
    try:
        waiting = {executor.submit(_run, job) for job in jobs}
        while waiting:
            yield from _reported(shared.reports)
            ended = {future for future in waiting if future.done()}
            waiting -= ended
            yield from (future.result() for future in ended)
    finally:
        shared.stop.set()
        executor.shutdown(wait=True, cancel_futures=True)


def _reported(reports: Any) -> Iterator[Steps]:
    """Give what is in the queue, waiting a moment for the first."""
    timeout = _SECONDS_BETWEEN_LOOKS
    while True:
        try:
            yield Steps(reports.get(timeout=timeout))
        except queue.Empty:
            return
        timeout = 0.0


def _enter(shared: _Shared) -> None:
    global _shared
    from megatron_moe.tools.study.train import enter_world

    enter_world()
    _shared = shared


def _run(job: Job) -> Run:
    from megatron_moe.tools.study.train import train

    shared = _shared
    assert shared is not None
    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        if os.getppid() != shared.parent:  # killed: nobody will ever end this worker
            os._exit(1)
        if shared.stop.is_set():
            raise StoppedError
        if done % _STEPS_BETWEEN_REPORTS == 0 or done == shared.plan.steps:
            shared.reports.put((done - 1) % _STEPS_BETWEEN_REPORTS + 1)

    return train(shared.plan, job.variant, shared.text, job.seed, on_step)
