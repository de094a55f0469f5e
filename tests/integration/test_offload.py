"""A process that may have less memory than its experts' weights trains them; without, it cannot.

The cap is on the process's own memory (``RLIMIT_DATA``); what is mapped from files does not count,
see `capped_run.py`. Anonymous memory is what the test is about: what is neither in a file nor freed
would break the cap.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.capped_run import ALLOWANCE, WEIGHTS

TESTS = Path(__file__).parents[1]


def test_experts_larger_than_memory(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "helpers.capped_run", str(tmp_path)],
        cwd=TESTS, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    runs = {run.pop("run"): run for run in map(json.loads, lines)}
    offloaded, plain = runs["offloaded, capped"], runs["plain"]

    training_state = 4 * WEIGHTS  # weights, gradients, two moments, all fp32
    assert offloaded["weights"] == plain["weights"] == WEIGHTS
    assert ALLOWANCE < WEIGHTS < training_state
    assert plain["data"] - offloaded["data"] > training_state * 0.9

    assert "out_of_memory" not in offloaded and len(offloaded["losses"]) == 2
    assert offloaded["losses"] == plain["losses"] and offloaded["norms"] == plain["norms"]
    assert plain["losses"][1] < plain["losses"][0]
    for name in ("plain, capped", "only weights offloaded, capped"):
        assert "allocate memory" in runs[name]["out_of_memory"]
        assert runs[name]["losses"] == []

    assert "offloaded, killed" in runs
    assert not list(tmp_path.iterdir())
