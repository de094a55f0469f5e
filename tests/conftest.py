"""Fixtures of the whole suite: the pool of gloo workers, and what the last lines of a run say."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Test files say `from helpers.pool import ...`; pytest's importlib mode adds no path by itself.
sys.path.insert(0, str(Path(__file__).parent))

from helpers.faults_table import FaultTable
from helpers.pool import Pool

# Wall time says nothing on a busy machine; per-test limits are pytest-timeout's.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

_POOL = pytest.StashKey[Pool]()
_FAULTS = pytest.StashKey[FaultTable]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-megatron",
        action="store_true",
        help="do not import Megatron in the workers; tests that need it there are skipped",
    )
    parser.addoption(
        "--faults-markdown",
        type=Path,
        metavar="FILE",
        help="write the table of upstream's faults there (run with -k upstream_faults)",
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the workers' imports run beside the first tests, if any test will need them."""
    fixtures = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if fixtures.isdisjoint({"pool", "torch_pool"}) or session.config.option.collectonly:
        return
    megatron = "pool" in fixtures and not session.config.getoption("--no-megatron")
    session.config.stash[_POOL] = Pool(megatron=megatron)
    session.config.stash[_POOL].warm_up()


@pytest.fixture(scope="session")
def torch_pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """The workers, for tests that need torch alone in them."""
    pool = request.config.stash[_POOL]
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest) -> Pool:
    """The workers, with Megatron imported and the CPU patches applied."""
    if request.config.getoption("--no-megatron"):
        pytest.skip("needs Megatron in the workers, and --no-megatron was given")
    return request.getfixturevalue("torch_pool")


@pytest.fixture(scope="session")
def faults(request: pytest.FixtureRequest) -> FaultTable:
    """The table of upstream's faults, shown after the last test."""
    return request.config.stash.setdefault(_FAULTS, FaultTable())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the table of faults if one was made, and what the pool cost."""
    table = terminalreporter.config.stash.get(_FAULTS, None)
    if table is not None and table.rows:
        terminalreporter.section("upstream's figures beside ours")
        terminalreporter.write_line(table.text())
        if path := terminalreporter.config.getoption("--faults-markdown"):
            table.write(path)
    _say_what_the_pool_cost(terminalreporter)


def _say_what_the_pool_cost(terminalreporter: pytest.TerminalReporter) -> None:
    """So that a slow run can be understood."""
    pool = terminalreporter.config.stash.get(_POOL, None)
    if pool is None or not pool.statistics.calls:
        return
    done = pool.statistics
    teams = ", ".join(f"{count} of {size}" for size, count in sorted(done.teams.items()))
    terminalreporter.write_line(
        f"gloo pool: {done.calls} calls, {done.in_calls:.1f} s in them, "
        f"{done.starting:.1f} s waiting for workers (teams forked: {teams})"
    )
