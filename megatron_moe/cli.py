"""The ``megatron-moe`` command: one line a subcommand, imported only when it is called."""

import importlib

import click

from megatron_moe.version import __version__

# name: (where its click command is, what `--help` says of it)
COMMANDS = {
    "run": ("megatron_moe.launch:command", "Start a training script with the plugin active."),
    "demo": ("megatron_moe.tools.demo:command", "Train a dense and an MoE GPT on this machine."),
    "data": ("megatron_moe.tools.data:command", "Turn text into Megatron's .bin and .idx."),
    "inspect": (
        "megatron_moe.tools.checkpoint.cli:inspect_command",
        "Say what a checkpoint is: layout, experts, optimizer, faults.",
    ),
    "reshard": (
        "megatron_moe.tools.checkpoint.cli:reshard_command",
        "Rewrite a checkpoint for another layout or format.",
    ),
    "verify": (
        "megatron_moe.tools.checkpoint.cli:verify_command",
        "Prove a checkpoint whole, or two equal.",
    ),
    "doctor": ("megatron_moe.doctor:command", "Say what is installed, and what it enables."),
    "patches": ("megatron_moe.patches.listing:command", "List the patches, and whether they fit."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module_name, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module_name), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="megatron-moe")
def main() -> None:
    """Mixture-of-Experts for Megatron-Core pretraining."""


if __name__ == "__main__":
    main()
