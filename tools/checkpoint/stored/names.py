"""Which global names a checkpoint's pickle may hold.

None is imported or called when it is read; but what is read is written again under its name, and
then loaded for real. So what could act there is refused here.
"""

from __future__ import annotations

import _compat_pickle
import sys

from megatron_moe.tools.checkpoint.stored.dtypes import BY_NAME

# Functions that rebuild data and do nothing else. Inert here, real where the output is loaded.
_REBUILD = {
    ("_codecs", "encode"),
    ("copyreg", "_reconstructor"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, names in {
            "multiarray": ("_reconstruct", "scalar"),
            "numeric": ("_frombuffer",),
        }.items()
        for name in names
    ),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch", "device"),
}
# Values of Python's own library that arguments may hold. No other name of it passes.
_VALUES = {
    *(("datetime", name) for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(
        (module, name)
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath")
    ),
    *((module, "BytesIO") for module in ("io", "_io")),
    ("collections", "Counter"),
    ("collections", "deque"),
    ("decimal", "Decimal"),
    ("fractions", "Fraction"),
    ("types", "SimpleNamespace"),
    ("uuid", "UUID"),
    ("signal", "Handlers"),
    ("signal", "Signals"),
}
# Libraries and parts of libraries whose classes build, load or fetch code.
_ACTING = (
    "distutils", "pip", "pkg_resources", "setuptools", "requests", "numpy.distutils", "numpy.f2py",
    "numpy.testing", "torch._dynamo", "torch._inductor", "torch.hub", "torch.jit", "torch.package",
    "torch.utils.cpp_extension",
)  # fmt: skip


def modern(module: str, name: str) -> tuple[str, str]:
    """Return what Python takes an old pickle's name for: ``commands.Popen`` is subprocess's."""
    if (module, name) in _compat_pickle.NAME_MAPPING:
        return _compat_pickle.NAME_MAPPING[module, name]
    return _compat_pickle.IMPORT_MAPPING.get(module, module), name


def allowed(module: str, name: str, trusted: frozenset[str]) -> bool:
    """Whether a name may stand in a pickle: classes of other libraries, values, rebuilders."""
    if (module, name) in _REBUILD | _VALUES or f"{module}.{name}" in trusted:
        return True
    if module.partition(".")[0] in sys.stdlib_module_names or "." in name:
        return False
    if any(f"{module}.".startswith(f"{acting}.") for acting in _ACTING):
        return False
    is_class = name.lstrip("_")[:1].isupper()
    is_constant = module == "torch" and (name in BY_NAME or name.endswith("Storage"))
    return is_class or is_constant
