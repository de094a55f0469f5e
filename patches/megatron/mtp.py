"""Multi-token-prediction layers get our MoE layer too."""

from dataclasses import replace
from typing import Any

from megatron_moe.config import MoEConfig
from megatron_moe.mcore.patching import Patch


def mtp_patch(moe: MoEConfig) -> Patch:
    """The patch, for one build of a model.

    Megatron rebuilds stock specs for the MTP block, whatever the decoder's spec was.
    """

    def ours(original: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron_moe.mcore.specs import with_moe_layer

        block = original(*args, **kwargs)
        if block is None:
            return None
        layers = []
        for layer in block.layer_specs:
            inner = with_moe_layer(layer.submodules.mtp_model_layer, moe)
            submodules = replace(layer.submodules, mtp_model_layer=inner)
            layers.append(replace(layer, submodules=submodules))
        return replace(block, layer_specs=layers)

    return Patch(
        target="megatron.training.models.gpt.mtp_block_spec",
        wrapper=ours,
        reason="the MTP block is built from stock specs; no argument or slot reaches it",
        versions=">=0.19,<0.20",
        fingerprints=("43ccd8c4a276",),
        retire_when="the GPT builder derives the MTP spec from the decoder's spec",
    )
