"""Our flags and our MoE layer in scripts that know nothing of them.

A script of its own (see ``examples/pretrain_gpt.py``) needs none of this: it passes
``add_moe_arguments`` and our model configuration through Megatron's own arguments.
"""

import argparse
from collections.abc import Callable
from typing import Any

from megatron_moe.mcore.patching import Patch

_VERSIONS = ">=0.19,<0.20"
_AddArguments = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def _parse_args(
    original: Callable[..., Any],
    extra_args_provider: _AddArguments | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    from megatron_moe.mcore.arguments import add_moe_arguments

    def with_ours(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = extra_args_provider(parser) if extra_args_provider else parser
        return add_moe_arguments(parser)

    return original(with_ours, *args, **kwargs)


def _wanted(args: argparse.Namespace) -> bool:
    """Whether this run has experts, and they are to be ours."""
    from megatron_moe.mcore.arguments import moe_config_from_args

    return bool(args.num_experts) and moe_config_from_args(args).layer_impl == "plugin"


def _gpt_config_from_args(
    original: Callable[..., Any],
    args: argparse.Namespace,
    config: Any = None,
    model_config_cls: type | None = None,
) -> Any:
    from megatron.training.models.gpt import GPTModelConfig

    if model_config_cls not in (None, GPTModelConfig):
        return original(args, config, model_config_cls)
    if not _wanted(args):
        return original(args, config)
    from megatron_moe.config import check
    from megatron_moe.mcore.arguments import moe_config_from_args
    from megatron_moe.mcore.builder import MoEGPTModelConfig

    ours = original(args, config, MoEGPTModelConfig)
    ours.moe = moe_config_from_args(args)
    check(ours.transformer, ours.moe)  # here, before any process group exists
    return ours


def _hybrid_config_from_args(
    original: Callable[..., Any], args: argparse.Namespace, *rest: Any, **kwargs: Any
) -> Any:
    hybrid = original(args, *rest, **kwargs)
    if _wanted(args) and args.spec is None and args.transformer_impl != "inference_optimized":
        from megatron_moe.config import check
        from megatron_moe.mcore.arguments import moe_config_from_args
        from megatron_moe.mcore.specs import hybrid_block_spec
        from megatron_moe.telemetry.tracker import install_tracker

        moe = moe_config_from_args(args)
        check(hybrid.transformer, moe)
        install_tracker(hybrid.transformer, moe)
        hybrid.hybrid_stack_spec = hybrid_block_spec(moe)
    return hybrid


def _pretrain(original: Callable[..., Any], cfg_container: Any, *args: Any, **kwargs: Any) -> Any:
    from megatron.training import get_args

    megatron_args = get_args()
    if cfg_container.model is None and _wanted(megatron_args) and megatron_args.spec is None:
        raise ValueError(
            "this script builds its model with a model_provider, which --moe-layer-impl plugin "
            "does not reach; pass pretrain() a model configuration from gpt_config_from_args, "
            "or choose --moe-layer-impl megatron"
        )
    return original(cfg_container, *args, **kwargs)


PATCHES = (
    Patch(
        target="megatron.training.arguments.parse_args",
        wrapper=_parse_args,
        reason="an unmodified script offers no place to add flags",
        retire_when="Megatron finds argument providers of plugins, for instance by entry point",
        versions=_VERSIONS,
        fingerprints=("9ae61a4f954f",),
    ),
    Patch(
        target="megatron.training.argument_utils.gpt_config_from_args",
        wrapper=_gpt_config_from_args,
        reason="an unmodified script always asks for Megatron's own GPT configuration",
        retire_when="a flag names the model configuration class",
        versions=_VERSIONS,
        fingerprints=("87db88f4477b",),
    ),
    Patch(
        target="megatron.training.argument_utils.hybrid_config_from_args",
        wrapper=_hybrid_config_from_args,
        reason="without --spec an unmodified script takes Megatron's own hybrid stack",
        retire_when="a flag names the model configuration class",
        versions=_VERSIONS,
        fingerprints=("aa743235472d",),
    ),
    Patch(
        target="megatron.training.training.pretrain",
        wrapper=_pretrain,
        reason="a script in the older style would train Megatron's layer without a word",
        retire_when="pretrain() no longer accepts a model_provider",
        versions=_VERSIONS,
        fingerprints=("538adc5ffb17",),
        holders=("megatron.training",),
    ),
)
