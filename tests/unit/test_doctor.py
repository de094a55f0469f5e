"""The doctor says what is installed, and fails when nothing can run."""

import importlib.metadata

import pytest
from click.testing import CliRunner

from megatron_moe import doctor
from megatron_moe.cli import main


@pytest.fixture
def versions(monkeypatch):
    """Versions that the doctor is told, by distribution; others are the installed ones."""
    told: dict[str, str | None] = {}
    installed = importlib.metadata.version

    def version(name):
        found = told[name] if name in told else installed(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return told


def finding(name):
    return next(found for found in doctor.find() if found.name == name)


def test_versions_and_what_they_enable(versions):
    versions["megatron-core"] = "0.19.2"
    assert finding("megatron-core").means == "within >=0.19,<0.20"
    assert not any(found.fault for found in doctor.find())
    assert finding("psutil").means == "Megatron's checkpoints"


@pytest.mark.parametrize(
    ("version", "means"),
    [
        ("0.20.0", "outside >=0.19,<0.20"),
        (None, "nothing trains without it: pip install 'megatron-core[training]'"),
    ],
)
def test_a_megatron_that_cannot_serve(versions, version, means):
    versions["megatron-core"] = version
    assert finding("megatron-core").means == means
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 1
    assert means.split()[0] in done.output


def test_transformer_engine_is_said_to_be_hidden_on_a_cpu(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "transformer_engine.py").write_text("raise SystemExit('imported')\n")
    assert "hidden from --device cpu" in finding("transformer-engine").means


def test_extras_are_shown_as_they_are_typed():
    if finding("transformer-engine").found != "missing":
        pytest.skip("Transformer Engine is installed here")
    done = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["doctor"])
    assert done.exit_code == 0
    assert "pip install megatron-moe[te]" in done.output
