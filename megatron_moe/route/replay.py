"""Routing replay: decisions in files, to be taken again or compared with.

A record has one file for each global batch and rank, ``batch-000012/rank-0003.npz``, written whole
or not at all, with the choices of every layer and micro-batch in the order in which they were made.

* ``record`` writes it. * ``replay`` decides as it says: two runs then differ in anything but the
routing (a kernel, a precision, a library version). * ``verify`` decides anew, and ends the run at
the first difference: a run that claims to be deterministic is.

Replay needs the layout, the batches and the layers of the record; what differs is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.route.decision import Picked
from megatron_moe.route.part import RouterPart
from megatron_moe.route.schedule import Schedule
from megatron_moe.route.tokens import Tokens

_NOBODY = -1


class ReplayError(RuntimeError):
    """A record does not fit the run, or the run does not decide as the record says."""


@dataclass
class _Batch:
    """The decisions of this rank in one global batch, by layer and micro-batch."""

    number: int
    decisions: dict[str, np.ndarray] = field(default_factory=dict)


class Replay(RouterPart):
    """One router's side of a record.

    Args:
        record: Folder to write, or empty.
        replay: Folder to read, or empty.
        verify: Whether to compare instead of replaying.
        schedule: Counts global batches.
    """

    def __init__(self, record: str, replay: str, verify: bool, schedule: Schedule) -> None:
        self.record_folder = Path(record) if record else None
        self.replay_folder = Path(replay) if replay else None
        self.verify = verify
        self.schedule = schedule
        self.layer: Any = None
        self._calls = 0

    def decide(self, fresh: Any, tokens: Tokens) -> Picked:
        """Decide in a pass of training.

        Args:
            fresh: Called for a new decision.
            tokens: The micro-batch.

        Raises:
            ReplayError: The record has no such decision, or another one.
        """
        name = f"layer{self.layer}.call{self._calls}"
        self._calls += 1
        picked = fresh()  # also where it is not followed: a choice learns from what it would do
        if self.replay_folder is not None:
            stored = self._stored(self.replay_folder, name, tokens)
            if self.verify:
                self._compare(name, picked, stored)
            picked = stored
        if self.record_folder is not None:
            _open(self.record_folder, self.schedule.finished).decisions[name] = _packed(picked)
        return picked

    def end_batch(self, summed: Tensor | None) -> None:
        """Write what the batch decided; the first router of a rank writes for all."""
        self._calls = 0
        if self.record_folder is not None:
            _close(self.record_folder)

    def _stored(self, folder: Path, name: str, tokens: Tokens) -> Picked:
        number = self.schedule.finished
        packed = _read(folder, number).get(name)
        if packed is None or packed.shape[0] != tokens.logits_TE.shape[0]:
            found = "nothing" if packed is None else f"{packed.shape[0]} tokens"
            raise ReplayError(
                f"{_file(folder, number)} has {found} for {name}, where this run decides about "
                f"{tokens.logits_TE.shape[0]}: routing_replay needs the layout, the batches and "
                "the layers of the record"
            )
        packed_TK = torch.from_numpy(packed.astype(np.int64)).to(tokens.logits_TE.device)
        chosen_TK = packed_TK >= 0
        indices_TK = torch.where(chosen_TK, packed_TK, -1 - packed_TK)
        return Picked(indices_TK, None if bool(chosen_TK.all()) else chosen_TK)

    def _compare(self, name: str, picked: Picked, stored: Picked) -> None:
        now, before = (np.maximum(_packed(p), _NOBODY) for p in (picked, stored))
        differs_T = (np.sort(now, axis=1) != np.sort(before, axis=1)).any(axis=1)
        if differs_T.any():
            token = int(differs_T.argmax())
            raise ReplayError(
                f"global batch {self.schedule.finished}, {name}: {int(differs_T.sum())} of "
                f"{len(now)} tokens chose other experts than recorded; the first is token {token}: "
                f"{now[token].tolist()} now, {before[token].tolist()} recorded"
            )


def _packed(picked: Picked) -> np.ndarray:
    """Choices as int16, ``(T, K)``; -1 - e where a place names expert e without choosing it.

    Such places count: the weight of a choice may depend on an expert that is not dispatched to.
    """
    indices_TK = torch.where(picked.mask(), picked.indices_TK, -1 - picked.indices_TK)
    return indices_TK.to(torch.int16).cpu().numpy()


def _file(folder: Path, number: int) -> Path:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return folder / f"batch-{number:06d}" / f"rank-{rank:04d}.npz"


_writing: dict[Path, _Batch] = {}
_reading: dict[Path, tuple[Path, Mapping[str, np.ndarray]]] = {}


def _open(folder: Path, number: int) -> _Batch:
    batch = _writing.get(folder)
    if batch is None or batch.number != number:
        batch = _writing[folder] = _Batch(number)
    return batch


def _close(folder: Path) -> None:
    """Write the batch whole; a run that is killed leaves no half file under the final name."""
    batch = _writing.pop(folder, None)
    if batch is None:
        return
    path = _file(folder, batch.number)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("wb") as file:
        np.savez_compressed(file, **batch.decisions)  # type: ignore[arg-type]
    unfinished.replace(path)


def _read(folder: Path, number: int) -> Mapping[str, np.ndarray]:
    path = _file(folder, number)
    kept = _reading.get(folder)
    if kept is None or kept[0] != path:
        if not path.is_file():
            raise ReplayError(
                f"{path} does not exist: routing_replay needs a record of this global batch by as "
                "many ranks"
            )
        with np.load(path) as file:
            kept = _reading[folder] = (path, dict(file))
    return kept[1]


def replay_of(moe: Any, schedule: Schedule) -> Replay | None:
    """The record that the options ask for."""
    if not (moe.routing_record or moe.routing_replay):
        return None
    return Replay(moe.routing_record, moe.routing_replay, moe.routing_verify, schedule)
