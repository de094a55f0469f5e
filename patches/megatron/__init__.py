"""What Megatron has no slot for, on any device: the plugin's seam and fixes."""

from megatron_moe.mcore.patching import Patch
from megatron_moe.patches.megatron import compile_helpers, seam

ALL: tuple[Patch, ...] = (*seam.PATCHES, *compile_helpers.PATCHES)
