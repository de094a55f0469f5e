"""Which files may import Megatron: the arithmetic must stay testable with torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Thin modules that Megatron sees; everything else in these folders imports torch only.
MAY_IMPORT_MEGATRON = {
    "layer.py",
    "route/router.py",
    "route/losses.py",
    "telemetry/tracker.py",
    "experts/sequential.py",
    "experts/grouped.py",
    "experts/stacked.py",
    "experts/sharding.py",
}
FOLDERS = ("route", "dispatch", "experts", "combine", "parallel", "telemetry")


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_only_thin_modules_import_megatron():
    package = ROOT / "megatron_moe"
    files = [package / "layer.py", package / "config.py"]
    files += [f for folder in FOLDERS for f in (package / folder).rglob("*.py")]
    found = {
        str(f.relative_to(package))
        for f in files
        if _imports(f) & {"megatron", "transformer_engine"}
    }
    assert found == MAY_IMPORT_MEGATRON


def test_importing_the_package_imports_neither_torch_nor_megatron():
    code = "import sys, megatron_moe; print({'torch', 'megatron'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
