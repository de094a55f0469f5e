"""Random models carried A → B → C → A for real: atoms come back byte for byte."""

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from helpers.synthetic import fill, reshard, seed
from helpers.synthetic_cases import journeys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_moe.tools.checkpoint.model.atoms import MASTER, WEIGHT, AtomId
from megatron_moe.tools.checkpoint.read.opened import Opened
from megatron_moe.tools.checkpoint.verify import Verdict, compare, verify
from megatron_moe.tools.checkpoint.write import manifest
from megatron_moe.tools.checkpoint.write.execute import Options


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda fd: None)


def whole(opened: Opened) -> Verdict:
    """Verify a checkpoint; each master was compared with its weight, bit by bit."""
    verdict = verify(opened, workers=1)
    assert verdict.faults == []
    masters = sum(atom.role == MASTER for atom in opened.tensors.atoms)
    assert verdict.checked["masters"] == masters
    assert verdict.checked["atoms"] == len(opened.tensors.atoms)
    return verdict


def known(opened: Opened, verdict: Verdict) -> dict[AtomId, str]:
    """Return the manifest's digests; they are those of the bytes."""
    said = manifest.digests_of(opened)
    assert said
    assert {atom: verdict.digests[atom] for atom in said} == said
    return said


def go_round(journey: Any, number: int, workers: int, ram: int) -> None:
    arch, targets, optimizer = journey
    with TemporaryDirectory() as folder:
        source = seed(arch, Path(folder) / "seed", optimizer=optimizer)
        fill(source, np.random.default_rng(number))
        expected = verify(source, workers=1)
        assert expected.faults == []
        stations, verdicts = [source], [expected]
        for i, wishes in enumerate([*targets, targets[0]]):
            options = Options(workers=workers, max_ram=ram)
            opened = reshard(stations[-1], Path(folder) / str(i), options=options, **wishes)
            verdicts.append(whole(opened))
            known(opened, verdicts[-1])
            assert compare(source, opened, expected.digests, verdicts[-1].digests) == []
            stations.append(opened)
        first, last = verdicts[1].digests, verdicts[-1].digests
        assert first == last
        assert compare(stations[1], stations[-1], {}, {}) == []
        same = {a: d for a, d in expected.digests.items() if a in first and not padded(a)}
        assert {a: first[a] for a in same} == same
        assert {a.name for a in first if a.role == WEIGHT} == {
            a.name for a in expected.digests if a.role == WEIGHT
        }


def padded(atom: AtomId) -> bool:
    """Whether an atom has rows that a vocabulary's padding adds or cuts."""
    return atom.name.startswith(("embedding.", "output_layer."))


def run(examples: int) -> int:
    counted: Counter = Counter()

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), database=None)
    @given(
        journeys(layers=2),
        st.integers(0, 1 << 30),
        st.sampled_from([1, 1, 2]),
        st.sampled_from([1 << 12, 1 << 30]),
    )
    def every(journey: Any, number: int, workers: int, ram: int) -> None:
        go_round(journey, number, workers, ram)
        counted["executed"] += 4

    every()
    return counted["executed"]


def test_atoms_come_back_byte_for_byte() -> None:
    assert run(7) >= 28


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4), ids=lambda i: f"{80 * (i + 1)}_executed")
def test_three_hundred_reshards_give_atoms_back(part: int) -> None:
    assert run(20) >= 80
