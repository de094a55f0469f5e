"""Build the virtual environment that `make demo` and `make test` run in.

Runs on any Python >= 3.9 and on nothing but its standard library, before anything is installed:

1. find uv, or install it with pip into ``.cache/uv-bootstrap`` (no system folder is written);
2. find Python 3.12 (on PATH, under pyenv, or fetched by uv) and make ``.venv`` with it;
3. install this package, editable, with its development extra.

A stamp written last makes the second call instant; a setup that was interrupted is done again.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

if __package__:
    from megatron_moe.tools.setup_console import Log, SetupError
else:  # run as a plain script: its own folder is on the path, the package is not installed yet
    from setup_console import Log, SetupError

ROOT = Path(__file__).resolve().parent.parent
WANTED = "3.12"
IS_WANTED = f"'%d.%d' % sys.version_info[:2] == '{WANTED}'"
UNFINISHED = "unfinished"
UV_FOLDER = Path(".cache") / "uv-bootstrap"
LOG_FILE = Path(".cache") / "setup.log"
STAMP_NAME = ".megatron-moe-setup.json"
UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "proxy": "ALL_PROXY",
    "cert": "SSL_CERT_FILE",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
NO_PIP = (
    "No Python with pip and no uv was found: install one of them "
    "(on Debian or Ubuntu: apt install python3-pip), then run make again."
)
NO_UV = (
    "pip could not install uv (full log: {log}): check that this machine reaches its package "
    "index, or put uv on PATH, then run make again."
)
NO_PYTHON = (
    "Python {wanted} was not found on PATH or under pyenv, and uv could not fetch it (full log: "
    "{log}): install it with your package manager, or with: pyenv install {wanted}, then run make "
    "again."
)
NO_INSTALL = "Installing the dependencies failed (full log: {log}); run make again to retry."


def main(argv: list[str] | None = None) -> int:
    """Set up; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="folder to build")
    options = parser.parse_args(argv)
    try:
        set_up(ROOT, (ROOT / options.venv).absolute())
    except SetupError as fault:
        print(f"setup: {fault}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; run make again to start over", file=sys.stderr)
        return 130
    return 0


def set_up(root: Path, venv: Path) -> None:
    """Bring ``venv`` to the state that the project's files ask for, or raise ``SetupError``."""
    wanted = {"root": str(root), "files": digest(root)}
    stamp, python = venv / STAMP_NAME, venv / "bin" / "python"
    found = read_stamp(stamp)
    healthy = answers(python, IS_WANTED)
    if healthy and found == wanted:
        return
    log = Log(root / LOG_FILE)
    uv = find_uv(root, log)
    env = {**os.environ, **uv_environment(pip_settings(pip_python()), os.environ)}
    if healthy and trusted(found, wanted):
        log.say(f"[2/3] {venv.name} is there, bringing it up to date")
    else:
        make_venv(venv, uv, env, log)
    stamp.write_text(json.dumps({**wanted, "files": UNFINISHED}))
    log.say("[3/3] installing megatron-moe and its dependencies (PyTorch is the large one)")
    install = [*uv, "pip", "install", "--python", str(python), "-e", f"{root}[dev]"]
    if log.run(install, env=env) != 0:
        raise SetupError(NO_INSTALL.format(log=log.path))
    stamp.write_text(json.dumps(wanted))
    log.say(f"set up: {venv}")


def trusted(found: dict[str, str] | None, wanted: dict[str, str]) -> bool:
    """Whether an environment may be updated in place.

    One without a stamp is the user's own. One that a setup left half done, or that came along
    when the clone was copied (its scripts name the old place), is made anew.
    """
    if found is None:
        return True
    return found.get("root") == wanted["root"] and found.get("files") != UNFINISHED


def make_venv(venv: Path, uv: list[str], env: dict[str, str], log: Log) -> None:
    """Make an empty environment in the place of whatever environment is there."""
    if venv.exists() and any(venv.iterdir()):
        if not (venv / "pyvenv.cfg").exists():
            raise SetupError(
                f"{venv} exists and is no virtual environment: move it away or delete it."
            )
        log.say(f"[2/3] {venv.name} is unfinished or not of this folder: removing it")
        shutil.rmtree(venv)
    base = find_python()
    log.say(f"[2/3] making {venv.name} with Python {base or f'{WANTED}, looked for by uv'}")
    if log.run([*uv, "venv", "--python", base or WANTED, str(venv)], env=env) != 0:
        raise SetupError(NO_PYTHON.format(wanted=WANTED, log=log.path))


def digest(root: Path) -> str:
    """Hash of what decides the content of the environment."""
    content = b"".join((root / name).read_bytes() for name in ("pyproject.toml", "setup.py"))
    return hashlib.sha256(content + WANTED.encode()).hexdigest()


def read_stamp(stamp: Path) -> dict[str, str] | None:
    """The stamp's content; None where there is none, an empty one where it is damaged."""
    try:
        return dict(json.loads(stamp.read_text()))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def find_uv(root: Path, log: Log) -> list[str]:
    """The command that starts uv, installing it into a private folder where it is missing.

    The `uv` on PATH may be a pyenv shim that fails under this folder's `.python-version`, so
    each candidate has to answer before it is believed.
    """
    private = root / UV_FOLDER / "bin" / "uv"
    for command in ([str(private)], ["uv"], [sys.executable, "-m", "uv"]):
        if quiet([*command, "--version"]) == 0:
            log.say(f"[1/3] uv: {' '.join(command)}")
            return command
    python = pip_python()
    if python is None:
        raise SetupError(NO_PIP)
    log.say(f"[1/3] installing uv with pip into {UV_FOLDER}")
    shutil.rmtree(root / UV_FOLDER, ignore_errors=True)
    # --target leaves the Python it runs on alone, so it also works where PEP 668 forbids more.
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    env = {**os.environ, "PIP_ROOT_USER_ACTION": "ignore"}
    if log.run([*pip, "--target", str(root / UV_FOLDER), "uv"], env=env) != 0:
        raise SetupError(NO_UV.format(log=log.path))
    return [str(private)]


def find_python() -> str | None:
    """A Python 3.12 that answers, or None: then uv looks further and may fetch one."""
    return next((p for p in interpreters(WANTED) if answers(p, IS_WANTED)), None)


def pip_python() -> str | None:
    """An interpreter that has pip: this one if it can be."""
    return next((p for p in interpreters("3") if answers(p, "__import__('pip')")), None)


def interpreters(version: str) -> Iterator[str]:
    """Names and paths that may be a Python ``version`` (``3`` is any), the likeliest first."""
    yield sys.executable
    yield f"python{version}"
    yield from ("python3", "python", "/usr/bin/python3")
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for folder in sorted(pyenv.glob(f"{version}.*"), reverse=True):
        yield str(folder / "bin" / "python")


def answers(python: str | Path, condition: str) -> bool:
    """Whether ``python`` starts (a pyenv shim may not) and the expression is true in it."""
    return quiet([str(python), "-c", f"import sys; sys.exit(0 if ({condition}) else 1)"]) == 0


def quiet(command: list[str]) -> int:
    """Exit status of a command whose output nobody needs; 127 where it cannot be started."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        ).returncode
    except OSError:
        return 127


def pip_settings(python: str | None) -> dict[str, str]:
    """What the user's pip is configured to do: option name to value, environment over file."""
    if python is None:
        return {}
    listing = subprocess.run(
        [python, "-m", "pip", "config", "list"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    ).stdout
    rank = {"global": 0, "install": 1, ":env:": 2}
    settings: dict[str, tuple[int, str]] = {}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        section, _, option = key.partition(".")
        order = rank.get(section, -1)
        if order >= settings.get(option, (0, ""))[0]:
            settings[option] = (order, str(ast.literal_eval(value)))
    return {option: value for option, (_, value) in settings.items()}


def uv_environment(settings: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Pip's settings as uv's variables, less those that ``environ`` already decides."""
    wishes = {}
    for option, value in settings.items():
        if option in UV_NAMES and value:
            separator = "," if option == "find-links" else " "
            wishes[UV_NAMES[option]] = separator.join(value.split())
    if "UV_INDEX" in wishes:
        # pip takes the best version over all its indexes; uv's own rule stops at the first.
        wishes["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return {name: value for name, value in wishes.items() if name not in environ}


if __name__ == "__main__":
    sys.exit(main())
