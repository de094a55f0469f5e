"""Give a worker back in the state in which a test found it.

Megatron keeps its groups, arguments, random states and trackers in module globals. Instead of
calling a dozen `destroy_*` functions and missing the thirteenth, the values of all module globals
of Megatron are remembered once and put back after each call; what hides in class attributes is
listed by name. Process groups are the exception: making the ~60 groups of a layout costs about a
second on gloo, so those made by Megatron are kept and handed out again for the same ranks and
purpose.
"""

import gc
import os
import random
import sys
from types import ModuleType
from typing import Any

import numpy
import torch
import torch.distributed as dist

_PACKAGES = ("megatron", "megatron_moe")
_LOSS_SCALERS = (
    ("megatron.core.transformer.moe.moe_utils", "MoEAuxLossAutoScaler"),
    ("megatron.core.transformer.multi_token_prediction", "MTPLossAutoScaler"),
)


def _is_state(name: str, value: Any) -> bool:
    return not name.startswith("__") and not isinstance(value, ModuleType)


class Snapshot:
    """The state of a worker before its first call.

    What a call changes inside a global list or dict stays: registries filled by an import must.
    """

    def __init__(self) -> None:
        self._globals: dict[str, dict[str, Any]] = {}
        self._remember_new_modules()
        self._scales = {
            (module, owner): getattr(sys.modules[module], owner).main_loss_backward_scale
            for module, owner in _LOSS_SCALERS
            if module in sys.modules
        }
        self._environ = dict(os.environ)
        self._path = list(sys.path)

    def _remember_new_modules(self) -> None:
        for name, module in list(sys.modules.items()):
            if name not in self._globals and name.partition(".")[0] in _PACKAGES:
                state = {k: v for k, v in vars(module).items() if _is_state(k, v)}
                self._globals[name] = state

    def restore(self) -> None:
        """Put everything back and free what the call left behind."""
        for name, state in self._globals.items():
            namespace = vars(sys.modules[name]) if name in sys.modules else {}
            for key, value in state.items():
                if namespace.get(key, value) is not value:
                    namespace[key] = value
        for (module, owner), scale in self._scales.items():
            loss_scaler = getattr(sys.modules[module], owner)
            loss_scaler.main_loss_backward_scale = None if scale is None else scale.clone()
        if dict(os.environ) != self._environ:
            os.environ.clear()
            os.environ.update(self._environ)
        sys.path[:] = self._path
        reset_torch()
        self._remember_new_modules()


def reset_torch() -> None:
    """Set random states, dtype and modes of this process to known values."""
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    if torch.are_deterministic_algorithms_enabled():  # the setter imports all of inductor
        torch.use_deterministic_algorithms(False)
    torch.default_generator.manual_seed(1234)
    numpy.random.seed(1234)
    random.seed(1234)
    gc.collect()


class GroupCache:
    """Stands in for ``dist.new_group`` where Megatron makes groups; one group per (ranks, purpose).

    Every rank of a team asks in the same order, so hits and misses agree between ranks.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple, Any] = {}

    def create_group(self, ranks=None, timeout=None, backend=None, group_desc=None, **_ignored):
        """Return the group of ``ranks`` for the purpose ``group_desc``, made at the first call."""
        ranks = tuple(range(dist.get_world_size()) if ranks is None else ranks)
        key = (ranks, backend, group_desc)
        # Megatron's destroy_model_parallel destroys the groups so named: never hand one out twice.
        if key not in self._groups or str(group_desc).endswith("_GLOO"):
            self._groups[key] = dist.new_group(
                list(ranks), timeout=timeout, backend=backend, group_desc=group_desc
            )
        return self._groups[key]

    def install(self) -> None:
        """Make Megatron's ``parallel_state`` take its groups from here."""
        from megatron.core import parallel_state

        parallel_state.create_group = self.create_group

    def destroy_others(self) -> None:
        """Destroy the groups that a test made itself."""
        keep = {id(group) for group in self._groups.values()} | {id(dist.group.WORLD)}
        for group in list(dist.distributed_c10d._world.pg_map):
            if id(group) not in keep:
                dist.destroy_process_group(group)
