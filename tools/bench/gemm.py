"""Forms of the experts' matrix product, beside each other: why `grouped_gemm` has the two it has.

    python tools/bench/gemm.py

A step is what one linear layer of all experts costs: forward and both gradients. The rows of an
expert are drawn evenly, as a balanced router gives them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_moe.experts.grouped_gemm import grouped_linear
from megatron_moe.tools.bench.clock import clock_for, fastest_in_turns
from megatron_moe.tools.bench.process import PINNED
from megatron_moe.tools.bench.shapes import NUM_TOKENS, SHAPES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
def main(rounds: int) -> None:
    """Measure one linear layer of all experts, in every form, at every shape."""
    environment = PINNED | {"OMP_NUM_THREADS": "1"}
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment)
    torch.set_num_threads(1)
    table = Table(title="first linear layer of all experts, forward + backward, CPU ms")
    for column in ("shape", "dtype", "rows an expert", *forms()):
        table.add_column(column, justify="left" if column in ("shape", "dtype") else "right")
    for dtype_name, dtype in DTYPES.items():
        for shape in SHAPES.values():
            torch.manual_seed(1)
            experts = torch.randint(shape.num_experts, (NUM_TOKENS * shape.topk,))
            rows_e = torch.bincount(experts, minlength=shape.num_experts).tolist()
            x = torch.randn(sum(rows_e), shape.hidden, dtype=dtype, requires_grad=True)
            weight = torch.randn(
                shape.num_experts, shape.ffn, shape.hidden, dtype=dtype, requires_grad=True
            )
            grad = torch.randn(sum(rows_e), shape.ffn, dtype=dtype)
            steps = {name: _step(form, x, weight, rows_e, grad) for name, form in forms().items()}
            best = fastest_in_turns(steps, rounds, clock_for(1))
            times = [f"{best[name] * 1e3:.1f}" for name in steps]
            table.add_row(shape.name, dtype_name, f"{min(rows_e)}–{max(rows_e)}", *times)
    Console().print(table)


Form = Callable[[Tensor, Tensor, list[int]], Tensor]


def forms() -> dict[str, Form]:
    """Everything that was tried: the first two are the package's own."""
    return {
        "grouped_mm": lambda x, w, rows_e: grouped_linear(x, w, rows_e, "grouped_mm"),
        "loop": lambda x, w, rows_e: grouped_linear(x, w, rows_e, "loop"),
        "padded bmm": padded,
        "separate weights": separate,
    }


def padded(x_RD: Tensor, weight_eFD: Tensor, rows_e: list[int]) -> Tensor:
    """Pad every expert to the rows of the fullest and multiply in one batch."""
    most, num_experts = max(rows_e), len(rows_e)
    slots_er = torch.arange(num_experts * most).view(num_experts, most)
    slot_R = torch.cat([slots[:rows] for slots, rows in zip(slots_er, rows_e, strict=True)])
    x_SD = x_RD.new_zeros(num_experts * most, x_RD.shape[1]).index_copy(0, slot_R, x_RD)
    y_erF = torch.bmm(x_SD.view(num_experts, most, -1), weight_eFD.transpose(1, 2))
    return y_erF.flatten(0, 1).index_select(0, slot_R)


def separate(x_RD: Tensor, weight_eFD: Tensor, rows_e: list[int]) -> Tensor:
    """One product an expert under plain autograd, the stacked weight unbound."""
    parts = zip(x_RD.split(rows_e), weight_eFD.unbind(0), strict=True)
    return torch.cat([x @ w.t() for x, w in parts])


def _step(
    form: Form, x: Tensor, weight: Tensor, rows_e: list[int], grad: Tensor
) -> Callable[[], None]:
    def run() -> None:
        torch.autograd.grad(form(x, weight, rows_e), (x, weight), grad)

    return run


if __name__ == "__main__":
    main()
