"""The manifest beside an output: a checksum for each atom, in a form no layout changes.

Two checkpoints, of whatever format and layout, hold the same if their atoms have the same
checksums; comparing manifests reads neither again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_moe.tools.checkpoint.model.atoms import AtomId
from megatron_moe.tools.checkpoint.plan.compile import Plan
from megatron_moe.tools.checkpoint.read.opened import Opened
from megatron_moe.tools.checkpoint.write.publish import write_forced
from megatron_moe.version import __version__

NAME = "reshard_manifest.json"


def key_of(atom: AtomId) -> str:
    """Return an atom's key in a manifest."""
    return f"{atom.role}:{atom.name}"


def read(folder: Path) -> dict[str, Any]:
    """Return the manifest beside a checkpoint, or an empty one."""
    path = folder / NAME
    return json.loads(path.read_text()) if path.is_file() else {}


def digests_of(opened: Opened) -> dict[AtomId, str]:
    """Return the atoms' checksums that a checkpoint's manifest holds, for files unchanged since."""
    found = read(opened.folder)
    sizes = found.get("files", {})
    if any(opened.files.get(name) != size for name, size in sizes.items()):
        return {}
    out = {}
    for key, (_, _, digest) in found.get("atoms", {}).items():
        role, _, name = key.partition(":")
        if digest is not None:
            out[AtomId(name, role)] = digest
    return out


def write(plan: Plan, folder: Path, digests: dict[int, str], identity: str) -> None:
    """Write the manifest of a finished plan.

    Args:
        plan: What was done.
        folder: Of the new checkpoint.
        digests: Of the atoms that were moved, by job. Atoms in linked files were not read: they
            have the source's checksum where it has a manifest, else none.
        identity: Digest of the plan.
    """
    known = digests_of(plan.source)
    moved = {plan.jobs[number].atom: digest for number, digest in digests.items()}
    atoms = {}
    for atom, shape in plan.target.shapes.items():
        held = plan.source.tensors.atoms.get(atom)
        digest = moved.get(atom) or (known.get(atom) if held and held.shape == shape else None)
        dtype = held.dtype.name if held else "float32"
        atoms[key_of(atom)] = [dtype, list(shape), digest]
    content = {
        "written_by": f"megatron-moe {__version__}",
        "checksum": "xxh3-128 of the row-major little-endian bytes of an atom",
        "plan": identity,
        "source": str(plan.source.folder),
        "source_layout": str(plan.source.layout),
        "layout": str(plan.to.layout),
        "format": plan.to.form,
        "optimizer": plan.to.optimizer,
        "files": {file.path: file.size for file in plan.target.files},
        "dropped": [vars(drop) for drop in plan.dropped],
        "invented": plan.invented,
        "atoms": atoms,
    }
    write_forced(folder / NAME, json.dumps(content, indent=0).encode())
