"""The command ``megatron-moe data``; its imports are light until it runs."""

import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from megatron_moe.tools.data.output import Manifest


@click.command("data")
@click.argument("inputs", metavar="[INPUT]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out", "prefix", required=True, metavar="PREFIX", type=click.Path(path_type=Path),
              help="Write PREFIX.bin, PREFIX.idx, PREFIX.tokenizer/ and PREFIX.json.")  # fmt: skip
@click.option("--tokenizer", default="bpe", show_default=True, metavar="bpe|byte|PATH",
              help="Learn a byte-level BPE, take bytes, or use a Hugging Face folder.")  # fmt: skip
@click.option("--vocab-size", default=8192, show_default=True, help="Tokens to learn, with bpe.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one a core]")
@click.option("--json-key", default="text", show_default=True, help="The text's key in .jsonl.")
@click.option("--limit-mb", type=float, help="Read about this many megabytes only.")
@click.option("--progress", type=click.Choice(["auto", "bar", "plain"]), default="auto",
              show_default=True, help="A bar, plain lines, or by the terminal.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the dataset at PREFIX.")
def command(
    inputs: tuple[Path, ...],
    prefix: Path,
    tokenizer: str,
    vocab_size: int,
    workers: int | None,
    json_key: str,
    limit_mb: float | None,
    progress: str,
    force: bool,
) -> None:
    """Turn text into the dataset that Megatron trains on.

    INPUT is a text file, a .jsonl or .jsonl.gz with one document a line, or a folder of such
    files; without one, the source of Python's standard library on this machine.
    """
    from megatron_moe.tools.data.prepare import Request, prepare
    from megatron_moe.tools.data.progress import shown
    from megatron_moe.tools.data.sources import DataError

    started = time.monotonic()
    request = Request(
        inputs=inputs,
        prefix=prefix,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        workers=workers or cores(),
        json_key=json_key,
        limit_mb=limit_mb,
        force=force,
    )
    try:
        with shown(progress) as display:
            manifest, was_there = prepare(request, display)
    except DataError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:  # a full disk, a missing permission
        raise click.ClickException(f"{error.filename or prefix}: {error.strerror}") from error
    if was_there:
        click.echo(f"{prefix} is up to date")
    click.echo("\n".join(summary(prefix, manifest, time.monotonic() - started)))


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def summary(prefix: Path, manifest: "Manifest", seconds: float) -> list[str]:
    """Return the lines that say what was made and how to train on it."""
    from megatron_moe.tools.data.output import flags, validation_percent

    lines = [
        f"{prefix}: {manifest.tokens:,} tokens in {manifest.documents:,} documents, from "
        f"{manifest.text_bytes / 1e6:,.1f} MB of text ({manifest.bytes_per_token:.2f} bytes a "
        f"token), vocabulary {manifest.vocab_size:,}, {seconds:.1f} s"
    ]
    if manifest.empty:
        lines.append(f"  left out: {manifest.empty:,} empty documents")
    if manifest.skipped:
        lines.append(f"  left out: {_some([f'{k} {v}' for k, v in manifest.skipped.items()])}")
    if manifest.replaced:
        places = _some([f"{name} ({count:,})" for name, count in manifest.replaced.items()])
        lines.append(f"  not UTF-8, replaced by U+FFFD: {places}")
    asked = manifest.request["vocab_size"]
    if asked is not None and manifest.vocab_size != asked:
        lines.append(f"  the text yields {manifest.vocab_size:,} tokens, fewer than {asked:,}")
    if validation_percent(manifest.sequences) == 0:
        lines.append("  one sequence only: nothing is left to validate on")
    return [*lines, "Megatron's flags:", f"  {shlex.join(flags(prefix))}"]


def _some(items: list[str], most: int = 3) -> str:
    rest = len(items) - most
    return "; ".join(items[:most]) + (f"; and {rest:,} more" if rest > 0 else "")
