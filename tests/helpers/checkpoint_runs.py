"""The half of `checkpoints.py` that pytest's own process may import."""

from typing import Any

from helpers.runs import Job, Means


def save_and_go_on(world: Any, job: Job, means: Means, folder: str, form: str, more: int) -> list:
    from helpers import checkpoints

    return checkpoints.save_and_go_on(world, job, means, folder, form, more)


def resume(
    world: Any, job: Job, means: Means, folder: str, form: str, more: int, optimizer: bool
) -> list:
    from helpers import checkpoints

    return checkpoints.resume(world, job, means, folder, form, more, optimizer)
