"""What Megatron has no slot for, on any device: the plugin's seam and fixes."""

from megatron_moe.mcore.patching import Patch
from megatron_moe.patches.megatron import (
    bucket_padding,
    compile_helpers,
    load_optimizer_state,
    seam,
    synchronous_save,
)

ALL: tuple[Patch, ...] = (
    *seam.PATCHES,
    *compile_helpers.PATCHES,
    *synchronous_save.PATCHES,
    *bucket_padding.PATCHES,
    *load_optimizer_state.PATCHES,
)
