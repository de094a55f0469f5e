"""What Megatron has no slot for, on any device: the plugin's seam and fixes."""

from megatron_moe.mcore.patching import Patch
from megatron_moe.patches.megatron import (
    bucket_padding,
    compile_helpers,
    fresh_optimizer,
    load_optimizer_state,
    loss_scale,
    norm_without_engine,
    optional_state,
    place_offloaded,
    seam,
    synchronous_save,
)

ALL: tuple[Patch, ...] = (
    *seam.PATCHES,
    *compile_helpers.PATCHES,
    *synchronous_save.PATCHES,
    *bucket_padding.PATCHES,
    *load_optimizer_state.PATCHES,
    *loss_scale.PATCHES,
    *norm_without_engine.PATCHES,
    *fresh_optimizer.PATCHES,
    *optional_state.PATCHES,
    *place_offloaded.PATCHES,
)
