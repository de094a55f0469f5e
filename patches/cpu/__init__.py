"""What lets Megatron run on a CPU over gloo; in force under ``--device cpu`` only.

Each module holds one topic: the device, its streams, memory and random state, where tensors are
made, collectives, layer norms, the type names that the optimizers compare, and defaults of flags.
"""

from megatron_moe.mcore.patching import Patch
from megatron_moe.patches.cpu import (
    arguments,
    collectives,
    device,
    memory,
    norm,
    random_state,
    streams,
    tensor_types,
    tensors,
)

ALL: tuple[Patch, ...] = (
    *device.PATCHES,
    *streams.PATCHES,
    *memory.PATCHES,
    *random_state.PATCHES,
    *tensors.PATCHES,
    *collectives.PATCHES,
    *norm.PATCHES,
    *tensor_types.PATCHES,
    *arguments.PATCHES,
)
