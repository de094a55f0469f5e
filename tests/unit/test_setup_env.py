"""The setup script against a stand-in for uv: what it builds, trusts, redoes and says."""

import ast
import json
import sys
from pathlib import Path

import pytest

from megatron_moe.tools import setup_env
from megatron_moe.tools.setup_console import Log, SetupError

UV = """#!/bin/sh
echo "$@" >> {root}/calls
case "$1" in
  venv) for last; do :; done
        test -e {root}/refuse-python && echo "no download" && exit 2
        mkdir -p "$last/bin" && touch "$last/pyvenv.cfg" && ln -s {python} "$last/bin/python" ;;
  pip)  test ! -e {root}/refuse-install || {{ echo "index not reached"; exit 1; }} ;;
esac
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder like a fresh clone, whose uv writes down its calls and does next to nothing."""
    monkeypatch.setattr(setup_env, "pip_python", lambda: None)  # no second per test for its config
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "setup.py").write_text("")
    uv = tmp_path / setup_env.UV_FOLDER / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text(UV.format(root=tmp_path, python=sys.executable))
    uv.chmod(0o755)
    return tmp_path


def steps(clone):
    """The uv commands of a set-up since the last look, without the probing for a version."""
    calls = clone / "calls"
    words = [line.split()[0] for line in calls.read_text().splitlines()] if calls.exists() else []
    calls.unlink(missing_ok=True)
    return [word for word in words if word != "--version"]


def test_builds_once_and_then_does_nothing(clone):
    setup_env.set_up(clone, clone / ".venv")
    assert steps(clone) == ["venv", "pip"]
    setup_env.set_up(clone, clone / ".venv")
    assert not (clone / "calls").exists()


def test_changed_dependencies_are_installed_in_place(clone):
    setup_env.set_up(clone, clone / ".venv")
    steps(clone)
    (clone / ".venv" / "kept").touch()
    (clone / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    setup_env.set_up(clone, clone / ".venv")
    assert steps(clone) == ["pip"]
    assert (clone / ".venv" / "kept").exists()


def test_failed_install_keeps_the_log_and_is_redone_from_scratch(clone):
    (clone / "refuse-install").touch()
    with pytest.raises(SetupError, match=r"Installing the dependencies failed \(full log: .*\)"):
        setup_env.set_up(clone, clone / ".venv")
    assert "index not reached" in (clone / setup_env.LOG_FILE).read_text()
    (clone / "refuse-install").unlink()
    steps(clone)
    setup_env.set_up(clone, clone / ".venv")
    assert steps(clone) == ["venv", "pip"]


def test_environment_copied_along_with_a_clone_is_made_anew(clone):
    setup_env.set_up(clone, clone / ".venv")
    stamp = clone / ".venv" / setup_env.STAMP_NAME
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "root": "/elsewhere"}))
    steps(clone)
    setup_env.set_up(clone, clone / ".venv")
    assert steps(clone) == ["venv", "pip"]


def test_damaged_stamp_is_not_trusted(clone):
    setup_env.set_up(clone, clone / ".venv")
    (clone / ".venv" / setup_env.STAMP_NAME).write_text('{"root"')
    steps(clone)
    setup_env.set_up(clone, clone / ".venv")
    assert steps(clone) == ["venv", "pip"]


def test_folder_that_is_no_environment_is_left_alone(clone):
    (clone / "thesis").mkdir()
    (clone / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(SetupError, match="is no virtual environment: move it away or delete it"):
        setup_env.set_up(clone, clone / "thesis")
    assert (clone / "thesis" / "chapter.txt").read_text() == "mine"


def test_missing_python_is_one_sentence(clone, monkeypatch, capsys):
    (clone / "refuse-python").touch()
    monkeypatch.setattr(setup_env, "ROOT", clone)
    monkeypatch.setattr(setup_env, "find_python", lambda: None)
    assert setup_env.main([]) == 1
    said = capsys.readouterr().err
    assert said.startswith("setup: Python 3.12 was not found on PATH or under pyenv, and uv could")
    assert "then run make again" in said
    assert len(said.splitlines()) == 1


def test_no_pip_and_no_uv_is_one_sentence(clone, monkeypatch):
    monkeypatch.setattr(setup_env, "quiet", lambda command: 127)
    with pytest.raises(SetupError, match="No Python with pip and no uv was found: install one"):
        setup_env.set_up(clone, clone / ".venv")


def test_python_hidden_under_pyenv_is_found(tmp_path, monkeypatch):
    shims, root = tmp_path / "shims", tmp_path / "pyenv"
    hidden = root / "versions" / "3.12.99" / "bin" / "python"
    for folder in (shims, hidden.parent):
        folder.mkdir(parents=True)
    for name in ("python3", "python", "python3.12"):
        (shims / name).write_text("#!/bin/sh\nexit 127\n")
        (shims / name).chmod(0o755)
    hidden.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(shims))
    monkeypatch.setenv("PYENV_ROOT", str(root))
    monkeypatch.setattr(setup_env.sys, "executable", str(shims / "python3"))
    found = setup_env.find_python()
    # A /usr/bin/python3 that is 3.12 itself is as good.
    assert found in (str(hidden), "/usr/bin/python3")


def test_pip_settings_reach_uv(tmp_path):
    python = tmp_path / "python"
    listing = (
        ":env:.find-links='/mnt/wheels'",
        "global.extra-index-url='\\nsimple-a\\nsimple-b'",
        "global.find-links='/opt/a /opt/b'",
        "global.index-url='simple-0'",
        "install.index-url='simple-1'",
        "list.format='columns'",
    )
    lines = "\n".join(listing)
    python.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
    python.chmod(0o755)
    settings = setup_env.pip_settings(str(python))
    assert setup_env.uv_environment(settings, environ={}) == {
        "UV_FIND_LINKS": "/mnt/wheels",
        "UV_INDEX": "simple-a simple-b",
        "UV_DEFAULT_INDEX": "simple-1",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    kept = setup_env.uv_environment(settings, environ={"UV_INDEX": "mine", "UV_FIND_LINKS": "x"})
    assert set(kept) == {"UV_DEFAULT_INDEX", "UV_INDEX_STRATEGY"}


def test_several_find_links_are_separated_as_uv_wants():
    wishes = setup_env.uv_environment({"find-links": "/opt/a  /opt/b"}, environ={})
    assert wishes == {"UV_FIND_LINKS": "/opt/a,/opt/b"}


def test_log_keeps_the_text_without_the_control_codes(tmp_path, capfd):
    log = Log(tmp_path / "log")
    assert log.run(["printf", r"10%%\r\033[2K90%%\r\033[32mdone\033[0m\n"]) == 0
    assert log.path.read_text().splitlines()[-1] == "done"
    assert "90%" in capfd.readouterr().out
    assert log.run(["/no/such/program"]) == 127


@pytest.mark.parametrize("name", ["setup_env.py", "setup_console.py"])
def test_bootstrap_is_readable_for_python_3_9(name):
    source = Path(setup_env.__file__).with_name(name).read_text()
    ast.parse(source, feature_version=(3, 9))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert all(alias.name in sys.stdlib_module_names for alias in node.names)
