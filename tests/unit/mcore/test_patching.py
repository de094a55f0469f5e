"""Declared patches: applied whole or not at all, refused when upstream moved, undone exactly."""

import importlib
import re
import sys
from types import ModuleType

import pytest

from megatron_moe.mcore.patching import Patch, PatchError, applied, check, fingerprint

VERSIONS = {"megatron-core": "0.19.2", "torch": "2.15.0"}
UPSTREAM = """
LIMIT = 7

def capacity(tokens, factor=1):
    return tokens * factor

def other():
    return "other"

class Base:
    def inherited(self):
        return "base"

class Layer(Base):
    def forward(self, x):
        return x + 1

    @staticmethod
    def layout(n):
        return [n]

    @classmethod
    def make(cls):
        return cls()
"""


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    """Two modules on disk: one defines the names, one imported `capacity` by value."""
    (tmp_path / "fake_upstream.py").write_text(UPSTREAM)
    (tmp_path / "fake_holder.py").write_text("from fake_upstream import capacity\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("fake_upstream")
    importlib.import_module("fake_holder")
    yield module
    for name in ("fake_upstream", "fake_holder", "late_importer"):
        sys.modules.pop(name, None)


def patch(name, **changes):
    """A patch that fits the modules above, but for ``changes``."""
    target = importlib.import_module("fake_upstream")
    for part in name.split("."):
        target = getattr(target, part)
    fields = {
        "target": f"fake_upstream.{name}",
        "reason": "no slot",
        "retire_when": "there is one",
        "versions": ">=0.19,<0.20",
        "fingerprints": (fingerprint(target),),
    }
    if "value" not in changes:
        fields["wrapper"] = lambda original, *args, **kwargs: ("ours", original(*args, **kwargs))
    if name == "capacity":
        fields["holders"] = ("fake_holder",)
    return Patch(**(fields | changes))


def refused(patches, message):
    before = dict(vars(sys.modules["fake_upstream"]))
    with (
        pytest.raises(PatchError, match=f"^{re.escape(message)}"),
        applied(patches, VERSIONS),
    ):
        pytest.fail("was applied")
    assert dict(vars(sys.modules["fake_upstream"])) == before


def test_function_is_replaced_where_it_is_held_and_comes_back(upstream):
    original = upstream.capacity
    with applied([patch("capacity")], VERSIONS):
        assert upstream.capacity(3, factor=2) == ("ours", 6)
        assert sys.modules["fake_holder"].capacity(4) == ("ours", 4)
        assert upstream.capacity.__name__ == "capacity"
    assert upstream.capacity is original
    assert sys.modules["fake_holder"].capacity is original


def test_method_static_method_and_inherited_method(upstream):
    layer, raw = upstream.Layer, dict(vars(upstream.Layer))
    three = [patch("Layer.forward"), patch("Layer.layout"), patch("Layer.inherited")]
    with applied(three, VERSIONS):
        assert layer().forward(1) == ("ours", 2)
        assert layer.layout(5) == ("ours", [5])
        assert layer().layout(5) == ("ours", [5])
        assert layer().inherited() == ("ours", "base")
        assert upstream.Base().inherited() == "base"
    assert dict(vars(layer)) == raw


def test_value_and_class(upstream):
    ours = type("Ours", (), {})
    base = upstream.Base
    with applied([patch("LIMIT", value=9), patch("Base", value=ours)], VERSIONS):
        assert upstream.LIMIT == 9
        assert upstream.Base is ours
    assert upstream.LIMIT == 7
    assert upstream.Base is base


def test_importer_of_a_stand_in_gets_the_original_afterwards(upstream):
    with applied([patch("capacity")], VERSIONS):
        late = ModuleType("late_importer")
        sys.modules["late_importer"] = late
        exec("from fake_upstream import capacity as renamed", vars(late))
        assert late.renamed(2) == ("ours", 2)
    assert late.renamed is upstream.capacity


def test_undone_when_the_body_raises(upstream):
    original = upstream.other
    with pytest.raises(KeyError), applied([patch("other")], VERSIONS):
        raise KeyError
    assert upstream.other is original


def test_another_version(upstream):
    changed = patch("other", versions=">=0.20")
    refused([changed], "fake_upstream.other: made for megatron-core >=0.20, found 0.19.2")


def test_changed_source(upstream):
    changed = patch("other", fingerprints=("0123456789ab", "ba9876543210"))
    seen = fingerprint(upstream.other)
    refused(
        [changed],
        f"fake_upstream.other: source is {seen}, declared 0123456789ab or ba9876543210; "
        "read it again",
    )


def test_any_declared_source_fits(upstream):
    twice = patch("other", fingerprints=("0123456789ab", fingerprint(upstream.other)))
    assert check(twice, VERSIONS) is upstream.other


def test_missing_name_and_missing_module(upstream):
    gone = "fake_upstream.gone: no such name in megatron-core 0.19.2"
    refused([patch("other", target="fake_upstream.gone")], gone)
    refused([patch("other", target="no_such_module.f")], "no_such_module.f: no module of that name")


def test_undeclared_holder(upstream):
    refused(
        [patch("capacity", holders=())],
        "fake_upstream.capacity: imported by value in fake_holder:capacity; activate before",
    )


def test_declared_holder_that_holds_something_else(upstream):
    sys.modules["fake_holder"].capacity = None
    refused(
        [patch("capacity")],
        "fake_upstream.capacity: declared holder fake_holder does not hold it",
    )


def test_all_or_none(upstream):
    refused([patch("capacity"), patch("other", versions="<0.19")], "fake_upstream.other: made for")


def test_two_patches_on_one_target(upstream):
    refused([patch("other"), patch("other")], "fake_upstream.other: declared by two patches")


def test_second_application_while_the_first_is_in_force(upstream):
    with applied([patch("other")], VERSIONS):
        again = patch("other")
        with (
            pytest.raises(PatchError, match=r"already replaced; close the first activation"),
            applied([again], VERSIONS),
        ):
            pytest.fail("was applied twice")
        assert upstream.other() == ("ours", "other")
    assert upstream.other() == "other"


def test_somebody_else_replaced_it_meanwhile(upstream):
    original = upstream.other
    with (
        pytest.raises(PatchError, match=r"fake_upstream\.other: replaced by somebody else"),
        applied([patch("other")], VERSIONS),
    ):
        upstream.other = lambda: "theirs"
    assert upstream.other is original


def test_class_method_is_refused(upstream):
    refused([patch("Layer.make")], "fake_upstream.Layer.make: a class method cannot be wrapped")


def test_a_megatron_target_needs_its_fingerprint(upstream):
    with pytest.raises(AssertionError, match="needs its fingerprint"):
        patch("other", fingerprints=())


def test_fingerprint_follows_the_source_and_not_the_indentation(tmp_path, monkeypatch):
    (tmp_path / "fake_shapes.py").write_text(
        "def f(x):\n    return x\n\n"
        "class A:\n    def f(x):\n        return x\n\n"
        "def g(x):\n    return -x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    shapes = importlib.import_module("fake_shapes")
    try:
        assert fingerprint(shapes.f) == fingerprint(shapes.A.f)
        assert fingerprint(shapes.f) != fingerprint(shapes.g)
        assert fingerprint(7) != fingerprint(8)
    finally:
        del sys.modules["fake_shapes"]
