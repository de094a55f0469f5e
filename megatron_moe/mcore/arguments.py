"""Our flags beside Megatron's: one argparse group, made from :class:`MoEConfig`."""

from __future__ import annotations

import argparse
import re
from dataclasses import Field, fields
from typing import Any, get_args, get_type_hints

from megatron_moe.config import MoEConfig

_GROUP = "megatron-moe"


def add_moe_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the plugin's flags: Megatron's ``extra_args_provider``.

    Every field of :class:`MoEConfig` is a flag ``--moe-…``. A parser that has them already is
    returned as it is, so that a script may add them itself under ``megatron-moe run``.
    """
    if any(group.title == _GROUP for group in parser._action_groups):
        return parser
    group = parser.add_argument_group(_GROUP)
    for f in fields(MoEConfig):
        group.add_argument(flag(f.name), help=_help(f.name), **_form(f))
    return parser


def _form(f: Field[Any]) -> dict[str, Any]:
    """How argparse reads a field: a switch, a list or one value."""
    if isinstance(f.default, bool):
        return {"action": "store_true", "default": f.default}
    form = {"default": f.default, "choices": f.metadata.get("choices")}
    if isinstance(f.default, tuple):
        (of, _) = get_args(get_type_hints(MoEConfig)[f.name])
        return form | {"nargs": "*", "type": of}
    return form | {"type": type(f.default)}


def flag(field_name: str) -> str:
    """``layer_impl`` → ``--moe-layer-impl``."""
    return "--moe-" + field_name.replace("_", "-")


def moe_config_from_args(args: Any) -> MoEConfig:
    """Read the plugin's options from Megatron's namespace; absent ones take their defaults."""
    found = {
        f.name: _frozen(getattr(args, f"moe_{f.name}"))
        for f in fields(MoEConfig)
        if hasattr(args, f"moe_{f.name}")
    }
    return MoEConfig(**found)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _help(field_name: str) -> str:
    """The field's sentence in the docstring of MoEConfig."""
    assert MoEConfig.__doc__ is not None
    found = re.search(rf"^ +{field_name}: ((?:.+\n?)(?: {{12}}.+\n?)*)", MoEConfig.__doc__, re.M)
    assert found is not None, f"MoEConfig.{field_name} has no line in the docstring"
    return re.sub(r"\s+", " ", found[1]).replace("``", "").replace("%", "%%").strip()
