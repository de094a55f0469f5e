"""The story: text, a mixture of experts, its dense twin, a resume elsewhere, the results."""

import json
import shlex
import shutil
import sys
import time
from pathlib import Path

import click
from rich.console import Console

from megatron_moe.tools.demo import picture, plan
from megatron_moe.tools.demo.child import ChildError, run
from megatron_moe.tools.demo.display import shown_run
from megatron_moe.tools.demo.megatron_log import History
from megatron_moe.tools.demo.plan import Plan

EXAMPLE = Path("examples") / "pretrain_gpt.py"
SEEN = """\
[bold]What you saw[/bold]
  · Megatron's own training loop, data and checkpoints on a CPU, with our layer in the model.
  · {topk} of {experts} experts for each token: the arithmetic of the dense twin, {ratio:.1f} times
    the parameters; two processes owned {half} experts each and sent tokens to one another (EP=2).
  · {verdict}
  · One checkpoint, read by processes that split every matrix instead (TP=2): the training losses
    of the next {tail} steps were at most {drift:.0e} apart.

[bold]What to try next[/bold]
  · the commands above with options of your own, or Megatron-LM's pretrain_gpt.py in the place of
    examples/pretrain_gpt.py, unchanged: megatron-moe run --device cpu -n 2 pretrain_gpt.py …
  · --moe-layer-impl megatron: the same run with upstream's layer, to compare
  · megatron-moe data my_texts/ --out runs/mine: your own text
  · megatron-moe doctor: what is installed here, and what a GPU would add
Everything is in {folder}: data, logs, checkpoints, summary.json."""


@click.command("demo")
@click.option(
    "--quick", is_flag=True, help="A much smaller model and a few steps (about a minute)."
)
@click.option("--out", "folder", type=click.Path(path_type=Path), default=Path("runs") / "demo",
              show_default=True, help="Where data, logs and checkpoints go.")  # fmt: skip
def command(quick: bool, folder: Path) -> None:
    """Train a small mixture of experts beside a dense model, here on the CPU, and resume it."""
    console = Console(highlight=False)
    script = Path(__file__).resolve().parents[2] / EXAMPLE
    if not script.is_file():
        raise click.ClickException(
            f"{script} is not there: the demo runs from a clone of the repository, by `make demo`"
        )
    started = time.monotonic()
    try:
        here = Path.cwd()
        shown = script.relative_to(here) if script.is_relative_to(here) else script
        Demo(plan.QUICK if quick else plan.FULL, folder, shown, console).tell()
    except ChildError as failure:
        console.print(str(failure), markup=False, soft_wrap=True)
        raise click.ClickException("the demo stopped; see the lines above") from failure
    except KeyboardInterrupt:
        console.print(f"\nstopped; logs are in {folder}")
        raise SystemExit(130) from None
    console.print(f"[dim]{time.monotonic() - started:.0f} s in all[/dim]")


class Demo:
    """The runs and what they leave behind.

    Args:
        sizes: What to train.
        folder: Where everything goes.
        script: The pretraining script.
        console: Where to tell it.
    """

    def __init__(self, sizes: Plan, folder: Path, script: Path, console: Console) -> None:
        self.sizes = sizes
        self.folder = folder
        self.script = script
        self.console = console
        self.checkpoints = folder / "checkpoints"

    def tell(self) -> None:
        """Run all parts and print the results."""
        # Runs are made anew each time; the data command itself knows whether its work is done.
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        sizes, end = self.sizes, self.sizes.train_iters
        data = self._data()
        common = [*data, *plan.shared_options(sizes)]
        experts = [*common, *plan.expert_options(sizes)]
        where = str(self.checkpoints)
        self._heading(
            2, f"{sizes.experts} experts, top-{sizes.topk}, on two processes (EP=2, DP=2)"
        )
        moe = self._train("moe", [*experts, *plan.first_layout(sizes, where)], 0, end)
        self._heading(3, "the dense twin: same data, same steps, same arithmetic a token (DP=2)")
        dense = self._train("dense", [*common, *plan.dense_options(sizes)], 0, end)
        self._heading(4, f"iteration {sizes.iterations}, resumed in another layout (TP=2, EP=1)")
        options = [*experts, *plan.second_layout(sizes, where)]
        resumed = self._train("resumed", options, sizes.iterations, end)
        self._results(dense, moe, resumed)

    def _data(self) -> list[str]:
        """Make the dataset; returns Megatron's options for it."""
        from megatron_moe.tools.data import flags

        self._heading(1, "text to tokens: the source of Python's standard library on this machine")
        prefix = self.folder / "data" / f"stdlib-{self.sizes.text_mb}mb"
        words = ["data", "--out", str(prefix), "--vocab-size", str(self.sizes.vocab_size)]
        words += ["--limit-mb", str(self.sizes.text_mb), "--progress", "plain", "--force"]
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._command(words)
        run([*_program(), *words], self.folder / "data.log", self._echo)
        return flags(prefix)

    def _train(self, name: str, options: list[str], first: int, last: int) -> History:
        words = ["run", "--device", "cpu", "-n", "2", str(self.script), *options]
        self._command(words)
        log = self.folder / f"{name}.log"
        with shown_run(self.console, name, first, last, self.sizes.tokens_per_step) as display:
            run([*_program(), *words], log, display.line)
        missing = set(range(first + 1, last + 1)) - display.history.losses.keys()
        if missing:
            raise ChildError(f"{log} shows no loss for iteration {min(missing)}")
        return display.history

    def _results(self, dense: History, moe: History, resumed: History) -> None:
        sizes = self.sizes
        drift = max(abs(moe.losses[i] - resumed.losses[i]) for i in resumed.losses)
        self.console.print()
        for table in (picture.resumed(moe, resumed), picture.load(sizes, moe)):
            self.console.print(table, "")
        self.console.print(picture.losses(sizes, dense, moe), "")
        told = SEEN.format(
            topk=sizes.topk,
            experts=sizes.experts,
            half=sizes.experts // 2,
            ratio=sizes.moe_parameters / sizes.dense_parameters,
            verdict=verdict(dense, moe),
            tail=sizes.tail,
            drift=drift,
            folder=self.folder,
        )
        self.console.print(told, soft_wrap=True)
        runs = {"dense": dense, "moe": moe, "resumed": resumed}
        summary = {
            name: {
                "losses": history.losses,
                "validations": history.validations,
                "expert_load": history.last_load,
                "tokens_per_second": sizes.tokens_per_step / history.seconds_per_step(),
            }
            for name, history in runs.items()
        }
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1))

    def _heading(self, number: int, text: str) -> None:
        self.console.print(f"\n[bold]{number}/4  {text}[/bold]")

    def _command(self, words: list[str]) -> None:
        self.console.print(f"[dim]$ megatron-moe {shlex.join(words)}[/dim]", soft_wrap=True)

    def _echo(self, line: str) -> None:
        self.console.print(f"  {line.rstrip()}", markup=False, soft_wrap=True)


def verdict(dense: History, moe: History) -> str:
    """Say which model was better at the end, whichever it was."""
    last = max(dense.validations.keys() & moe.validations.keys())
    gain = dense.validations[last] - moe.validations[last]
    if gain > 0:
        return f"After {last} steps its validation loss was {gain:.3f} below the dense twin's."
    return (
        f"After {last} steps its validation loss was {-gain:.3f} above the dense twin's: experts "
        "see\n    a part of the tokens each, and so few steps do not repay that."
    )


def _program() -> list[str]:
    """This very installation's command, whatever is first on PATH."""
    return [str(Path(sys.executable).with_name("megatron-moe"))]
