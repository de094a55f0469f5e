"""What is said of the fused kernels that Megatron took."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from megatron_moe.mcore import kernels


@pytest.fixture
def megatron(monkeypatch):
    """A Megatron that took kernels of the given modules."""

    def took(adam, norm):
        core, models = ModuleType("megatron.core"), ModuleType("megatron.core.models")
        core.optimizer = SimpleNamespace(Adam=SimpleNamespace(__module__=adam))
        models.backends = SimpleNamespace(LNImpl=SimpleNamespace(__module__=norm))
        monkeypatch.setitem(sys.modules, "megatron.core", core)
        monkeypatch.setitem(sys.modules, "megatron.core.models", models)

    return took


TORCH = ("torch.optim.adamw", "megatron.core.transformer.torch_norm")


def test_without_them(megatron, monkeypatch):
    megatron(*TORCH)
    broken = {"apex"}
    monkeypatch.setattr(
        kernels.importlib.util, "find_spec", lambda name: name if name in broken else None
    )
    assert kernels.kernels_in_use() == [
        "Adam: torch's (Transformer Engine's is not installed; Apex's does not import)",
        "norms of the local spec: torch's (Apex's does not import)",
    ]


def test_with_them(megatron):
    megatron("transformer_engine.pytorch.optimizers.fused_adam", "megatron.core.fusions.fused_norm")
    assert kernels.kernels_in_use() == [
        "Adam: Transformer Engine's, fused",
        "norms of the local spec: Apex's, fused",
    ]
