"""Read the lines that Megatron's training loop, and our example script, write."""

import re
from dataclasses import dataclass, field

_STEP = re.compile(
    r"iteration +(?P<iteration>\d+)/ *(?P<of>\d+) \|"
    r".* elapsed time per iteration \(ms\): (?P<ms>[\d.]+) \|"
    r".* lm loss: (?P<loss>[-+.\dEe]+|nan|inf) \|"
)
_VALIDATION = re.compile(
    r"validation loss at iteration (?P<iteration>\d+).* lm loss value: (?P<loss>[-+.\dEe]+|nan) \|"
)
_LOAD = re.compile(r"expert load \| layer (?P<layer>\d+) \| (?P<counts>\d+(?: \d+)*)")


@dataclass(frozen=True)
class Step:
    """One training step: its loss and its duration in seconds."""

    iteration: int
    of: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Validation:
    """One pass over validation data."""

    iteration: int
    loss: float


@dataclass(frozen=True)
class Load:
    """Tokens that each expert of a layer has had."""

    layer: int
    counts: tuple[int, ...]


Record = Step | Validation | Load


def parse(line: str) -> Record | None:
    """Give what a line says, or None for the many lines that do not concern us."""
    if found := _STEP.search(line):
        seconds = float(found["ms"]) / 1000
        return Step(int(found["iteration"]), int(found["of"]), float(found["loss"]), seconds)
    if found := _VALIDATION.search(line):
        return Validation(int(found["iteration"]), float(found["loss"]))
    if found := _LOAD.search(line):
        return Load(int(found["layer"]), tuple(map(int, found["counts"].split())))
    return None


@dataclass
class History:
    """What a run with ``--log-interval 1`` has said so far, step by step."""

    losses: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    validations: dict[int, float] = field(default_factory=dict)
    first_load: dict[int, tuple[int, ...]] = field(default_factory=dict)
    last_load: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Take in one more record."""
        match record:
            case Step():
                self._add_step(record)
            case Validation():
                self.validations[record.iteration] = record.loss
            case Load():
                self.first_load.setdefault(record.layer, record.counts)
                self.last_load[record.layer] = record.counts

    def _add_step(self, step: Step) -> None:
        loss, seconds = step.loss, step.seconds
        if len(self.losses) == 1:
            # Megatron does not start its sums anew after a run's first line, so that the second
            # line says the mean of two steps (and the time of both).
            (before,), (took,) = self.losses.values(), self.seconds.values()
            loss, seconds = 2 * loss - before, max(seconds - took, 0.0)
        self.losses[step.iteration] = loss
        self.seconds[step.iteration] = seconds

    def seconds_per_step(self) -> float:
        """The median step, so that a start-up, a validation or a busy moment does not count."""
        ordered = sorted(self.seconds.values())
        if not ordered:
            raise ValueError("the run's log shows no training step")
        return ordered[len(ordered) // 2]
