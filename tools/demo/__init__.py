"""`make demo`: a real mixture of experts beside its dense twin, trained on this machine's CPU.

`plan` says what is trained and with which of Megatron's options, `child` runs a command and keeps
its log, `megatron_log` reads the lines that Megatron writes, `display` shows them as they come,
`picture` draws the results, `command` is the story from the text to the last table.
"""

from megatron_moe.tools.demo.command import command

__all__ = ["command"]
