"""Draw the results: losses beside each other, the experts' load as bars, the resumed losses."""

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from megatron_moe.tools.demo.megatron_log import History
from megatron_moe.tools.demo.plan import Plan

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_ROWS = 3  # of the bars; the middle of the second row is an even share


def losses(plan: Plan, dense: History, moe: History) -> Table:
    """Validation losses of both models after the same steps on the same data."""
    table = Table(title="Validation loss after the same steps on the same text", title_style="bold")
    table.add_column("iteration", justify="right")
    table.add_column("dense", justify="right")
    table.add_column("mixture of experts", justify="right")
    table.add_column("difference", justify="right")
    for iteration in sorted(dense.validations.keys() & moe.validations.keys()):
        a, b = dense.validations[iteration], moe.validations[iteration]
        table.add_row(str(iteration), f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}")
    table.add_section()
    table.add_row("parameters", _millions(plan.dense_parameters), _millions(plan.moe_parameters))
    active = _millions(plan.active_parameters)
    table.add_row("… a token meets", _millions(plan.dense_parameters), active)
    rates = [plan.tokens_per_step / run.seconds_per_step() for run in (dense, moe)]
    table.add_row("tokens/s", *(f"{rate:,.0f}" for rate in rates))
    return table


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def load(plan: Plan, moe: History) -> Table:
    """Share of the tokens that each expert of each layer got, early and late, as bars."""
    table = Table(
        title="Tokens by expert (half of the height is an even share)", title_style="bold"
    )
    table.add_column("layer", justify="right", vertical="middle")
    table.add_column(f"first {plan.eval_interval} steps")
    table.add_column(f"last {plan.tail} steps")
    table.add_column("busiest", justify="right", vertical="middle")
    table.add_column("idlest", justify="right", vertical="middle")
    for layer, counts in sorted(moe.last_load.items()):
        even = sum(counts) / len(counts)
        bars = (
            Text("\n".join(bar_rows(part)), style="cyan")
            for part in (moe.first_load[layer], counts)
        )
        table.add_row(
            str(layer), *bars, f"{max(counts) / even:.2f} ×", f"{min(counts) / even:.2f} ×"
        )
    return table


def bar_rows(counts: Sequence[int], rows: int = _ROWS) -> list[str]:
    """Give upright bars as lines of text, the highest line first.

    The full height is twice an even share; what is more is cut off there.
    """
    full = 2 * sum(counts) / len(counts)
    heights = [min(round(count / full * rows * 8), rows * 8) if full else 0 for count in counts]
    lines = []
    for row in reversed(range(rows)):
        cells = (_EIGHTHS[min(max(height - 8 * row, 0), 8)] * 2 for height in heights)
        lines.append(" ".join(cells))
    return lines


def resumed(unbroken: History, again: History) -> Table:
    """Training loss, step by step, of the run that went on and of the one resumed elsewhere."""
    table = Table(title="Loss after the checkpoint", title_style="bold")
    table.add_column("iteration", justify="right")
    table.add_column("went on: EP=2", justify="right")
    table.add_column("resumed: TP=2, EP=1", justify="right")
    table.add_column("difference", justify="right")
    shared = sorted(unbroken.losses.keys() & again.losses.keys())
    for iteration in [*shared[:4], *shared[-1:]] if len(shared) > 5 else shared:
        _difference(table, str(iteration), unbroken.losses, again.losses, iteration)
    table.add_section()
    for iteration in sorted(unbroken.validations.keys() & again.validations.keys()):
        _difference(
            table, f"validation, {iteration}", unbroken.validations, again.validations, iteration
        )
    return table


def _difference(
    table: Table, name: str, a: Mapping[int, float], b: Mapping[int, float], iteration: int
) -> None:
    here, there = a[iteration], b[iteration]
    table.add_row(name, f"{here:.5f}", f"{there:.5f}", f"{there - here:+.1e}")
