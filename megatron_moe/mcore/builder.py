"""A GPT with our MoE layers, multi-token-prediction layers included."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from megatron.training import argument_utils
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_moe.config import MoEConfig, MoEConfigError, check
from megatron_moe.mcore.arguments import moe_config_from_args
from megatron_moe.mcore.patching import applied
from megatron_moe.mcore.specs import gpt_block_spec
from megatron_moe.mcore.token_ids import feed_token_ids


@dataclass(kw_only=True)
class MoEGPTModelConfig(GPTModelConfig):
    """Megatron's GPT configuration, with the plugin's options and builder."""

    builder: ClassVar[str] = "megatron_moe.mcore.builder.MoEGPTModelBuilder"
    moe: MoEConfig = field(default_factory=MoEConfig)


class MoEGPTModelBuilder(GPTModelBuilder):
    """Builds each pipeline stage from our block spec.

    A layer spec that the user gave (``--spec``) is used as given.
    """

    def __init__(self, model_config: MoEGPTModelConfig) -> None:
        check(model_config.transformer, model_config.moe)
        super().__init__(model_config)
        if model_config.transformer_layer_spec is None:
            model_config.transformer_layer_spec = partial(gpt_block_spec, moe=model_config.moe)

    def build_distributed_models(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Build and wrap all stages of this rank; arguments as Megatron's.

        Raises:
            MoEConfigError: A wrapper is asked for under which experts were never shown to be right.
        """
        for option in ("use_megatron_fsdp", "use_torch_fsdp2"):
            if kwargs.get(option):
                raise MoEConfigError(
                    f"{option} with the plugin's experts: it reduces gradients in a way of its own "
                    "and runs on CUDA only, where it was never compared with other layouts; use "
                    "--use-distributed-optimizer, which shards experts' optimizer state as well, "
                    "or --moe-layer-impl megatron"
                )
        return super().build_distributed_models(*args, **kwargs)

    def build_model(self, *args: Any, **kwargs: Any) -> Any:
        """Build one stage; arguments as Megatron's."""
        from megatron_moe.patches.megatron.mtp import mtp_patch

        with applied([mtp_patch(self._model_config.moe)]):
            model = super().build_model(*args, **kwargs)
        feed_token_ids(model)
        return model


def gpt_config_from_args(args: Any) -> GPTModelConfig:
    """The model configuration for Megatron's ``pretrain``.

    Args:
        args: Megatron's parsed and validated arguments.

    Returns:
        Ours when the run has experts and ``--moe-layer-impl plugin``; else Megatron's, unchanged.
    """
    moe = moe_config_from_args(args)
    if not args.num_experts or moe.layer_impl != "plugin":
        return argument_utils.gpt_config_from_args(args)
    config = argument_utils.gpt_config_from_args(args, model_config_cls=MoEGPTModelConfig)
    config.moe = moe
    return config
