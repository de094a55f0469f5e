"""Declared, reversible replacements of functions, methods, classes and values upstream.

A patch is the last resort: where Megatron has a slot (spec, builder, argument), the slot is used.
Each patch says what it replaces, why no slot serves, which versions it was read against and when it
can go. A set of patches is applied whole or not at all, and undone in reverse, so that every name
holds the identical object again.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet

_MISSING: Any = object()
_MARK = "__megatron_moe_patch__"


class PatchError(RuntimeError):
    """A declared patch does not fit what is installed."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One replacement of one name upstream.

    Args:
        target: Dotted path of a function, method, class or value, e.g. ``megatron.core.utils.f``.
        wrapper: Called in place of a function or method, with the original as first argument.
        value: Put in place of the target as it is; give either this or ``wrapper``.
        reason: Why no slot upstream serves, in one sentence.
        retire_when: What makes this patch unnecessary.
        fingerprints: Accepted :func:`fingerprint` results; required for Megatron's own names,
            since a replacement is right only for the source it was read against.
        holders: Further places bound to the same object (``module`` or ``module:name``).
        versions: Accepted versions of ``distribution``.
        distribution: The package that owns the target: ``megatron-core`` or ``torch``.
    """

    target: str
    reason: str
    retire_when: str
    versions: str
    wrapper: Callable[..., Any] | None = None
    value: Any = _MISSING
    fingerprints: tuple[str, ...] = ()
    holders: tuple[str, ...] = ()
    distribution: str = "megatron-core"

    def __post_init__(self) -> None:
        """Refuse a declaration that says too little."""
        assert (self.wrapper is None) != (self.value is _MISSING), (
            f"{self.target}: wrapper or value"
        )
        assert self.reason and self.retire_when, f"{self.target}: say why, and until when"
        if self.distribution == "megatron-core":
            assert self.fingerprints, f"{self.target}: a Megatron target needs its fingerprint"


@dataclass(frozen=True)
class _Place:
    """One binding of a target: ``vars(owner)[name]``, or inherited when ``raw`` is missing."""

    owner: Any
    name: str
    raw: Any

    def put(self, new: Any) -> None:
        setattr(self.owner, self.name, new)

    def restore(self) -> None:
        if self.raw is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.raw)


def fingerprint(target: Any) -> str:
    """Return 12 hex digits of the SHA-256 of the target's source, or of its repr for a value."""
    plain = inspect.unwrap(target) if callable(target) else target
    if inspect.isroutine(plain) or inspect.isclass(plain):
        text = textwrap.dedent(inspect.getsource(plain))
    else:
        text = repr(plain)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def installed_version(distribution: str) -> str:
    """Return the version in force: a Megatron-LM checkout on the path wins over the wheel."""
    if distribution == "megatron-core" and (core := sys.modules.get("megatron.core")):
        return core.__version__
    return importlib.metadata.version(distribution)


def check(patch: Patch, versions: Mapping[str, str] | None = None) -> Any:
    """Return the object that ``patch`` would replace.

    Args:
        patch: The declaration to compare with what is installed.
        versions: Versions to assume by distribution, instead of the installed ones.

    Raises:
        PatchError: The version, the name, its source or its holders are not as declared.
    """
    original = _original(patch, versions or {})
    if undeclared := _undeclared_holders([(patch, original)]).get(patch.target):
        raise PatchError(_held(patch.target, undeclared))
    return original


@contextmanager
def applied(patches: Sequence[Patch], versions: Mapping[str, str] | None = None) -> Iterator[None]:
    """Apply all of ``patches`` or none; on exit put every original back, last first.

    Raises:
        PatchError: A patch does not fit, two patches share a target, or, on exit, somebody else
            has replaced a patched name in the meantime (the originals are back all the same).
    """
    targets = [patch.target for patch in patches]
    if twice := sorted({target for target in targets if targets.count(target) > 1}):
        raise PatchError(f"{', '.join(twice)}: declared by two patches")
    checked = [(patch, _original(patch, versions or {})) for patch in patches]
    for target, undeclared in _undeclared_holders(checked).items():
        raise PatchError(_held(target, undeclared))
    put: list[tuple[_Place, Any, Any]] = []
    try:
        for patch, original in checked:
            new = _stand_in(patch, original)
            for place in _places(patch):
                bound = _as_descriptor(place.raw, new)
                put.append((place, original, bound))
                place.put(bound)
        yield
    finally:
        _undo(put)


def _held(target: str, holders: list[str]) -> str:
    where = ", ".join(holders)
    if any(holder.startswith("megatron.") for holder in holders):
        return f"{target}: also held by {where}, not declared in holders; read it again"
    return f"{target}: imported by value in {where}; activate before that import"


def _undo(put: list[tuple[_Place, Any, Any]]) -> None:
    taken = []
    for place, _, new in reversed(put):
        if vars(place.owner).get(place.name, _MISSING) is not new:
            taken.append(f"{getattr(place.owner, '__name__', place.owner)}.{place.name}")
        place.restore()
    _release({id(new): (new, original) for _, original, new in put if callable(new)})
    if taken:
        raise PatchError(f"{', '.join(taken)}: replaced by somebody else while patched")


def _release(stand_ins: dict[int, tuple[Any, Any]]) -> None:
    """Give the originals to modules that imported a stand-in by value while it was in force."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("megatron_moe"):  # where replacements are defined
            continue
        for name, value in list(getattr(module, "__dict__", {}).items()):
            new, original = stand_ins.get(id(value), (None, None))
            if new is value and new is not None:
                setattr(module, name, original)


def _original(patch: Patch, versions: Mapping[str, str]) -> Any:
    found = versions.get(patch.distribution) or installed_version(patch.distribution)
    if not SpecifierSet(patch.versions).contains(found, prereleases=True):
        raise PatchError(
            f"{patch.target}: made for {patch.distribution} {patch.versions}, found {found}"
        )
    owner, name = _owner(patch.target)
    original = getattr(owner, name, _MISSING)
    if original is _MISSING:
        raise PatchError(f"{patch.target}: no such name in {patch.distribution} {found}")
    if hasattr(original, _MARK) or original is patch.value:
        raise PatchError(f"{patch.target}: already replaced; close the first activation")
    if patch.fingerprints and (seen := fingerprint(original)) not in patch.fingerprints:
        declared = " or ".join(patch.fingerprints)
        raise PatchError(f"{patch.target}: source is {seen}, declared {declared}; read it again")
    places = _places(patch)
    if isinstance(places[0].raw, classmethod):
        raise PatchError(f"{patch.target}: a class method cannot be wrapped; patch what it calls")
    for place in places[1:]:
        if place.raw is not original:
            holder = getattr(place.owner, "__name__", place.owner)
            raise PatchError(f"{patch.target}: declared holder {holder} does not hold it")
    return original


def _owner(target: str) -> tuple[Any, str]:
    """Return the module or class that holds the last name of a dotted path, and that name."""
    path, _, name = target.rpartition(".")
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        module_name = ".".join(parts[:cut])
        try:
            owner = importlib.import_module(module_name)
        except ModuleNotFoundError as missing:
            if missing.name is None or not f"{module_name}.".startswith(f"{missing.name}."):
                raise
            continue
        try:
            return functools.reduce(getattr, parts[cut:], owner), name
        except AttributeError as missing_name:
            raise PatchError(f"{target}: no such name ({missing_name})") from None
    raise PatchError(f"{target}: no module of that name is installed")


def _places(patch: Patch) -> list[_Place]:
    owner, name = _owner(patch.target)
    places = [_Place(owner, name, vars(owner).get(name, _MISSING))]
    for holder in patch.holders:
        module_name, _, alias = holder.partition(":")
        module = importlib.import_module(module_name)
        places.append(_Place(module, alias or name, vars(module).get(alias or name, _MISSING)))
    return places


def _stand_in(patch: Patch, original: Any) -> Any:
    if patch.wrapper is None:
        return patch.value
    wrapper = patch.wrapper

    @functools.wraps(original)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(stand_in, _MARK, patch.target)
    return stand_in


def _as_descriptor(raw: Any, new: Any) -> Any:
    """Keep a static method static: the class dictionary holds a descriptor, not the function."""
    return staticmethod(new) if isinstance(raw, staticmethod) else new


def _undeclared_holders(checked: list[tuple[Patch, Any]]) -> dict[str, list[str]]:
    """Return, by target, the modules that hold an original without being declared.

    Torch re-exports its own names in many places that do not matter here; for its names only
    Megatron's modules are searched.
    """
    wanted = {id(original): patch for patch, original in checked if callable(original)}
    declared = {
        (place.owner.__name__, place.name)
        for patch, _ in checked
        for place in _places(patch)
        if inspect.ismodule(place.owner)
    }
    found: dict[str, list[str]] = {}
    for module_name, module in list(sys.modules.items()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            patch = wanted.get(id(value))
            if patch is None or (module_name, name) in declared:
                continue
            if patch.distribution == "megatron-core" or module_name.startswith("megatron."):
                found.setdefault(patch.target, []).append(f"{module_name}:{name}")
    return found
