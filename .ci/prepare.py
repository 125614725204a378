# SPDX-License-Identifier: MIT
"""Make the project's virtual environment for this interpreter, and print the path of its Python.

    python3 .ci/prepare.py GROUP...

Installs each dependency group of pyproject.toml that .venv/VERSION lacks. Groups that cannot be installed (no network,
no wheel for this interpreter) cost one line on standard error. Without any of them, prints the interpreter itself.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  (before the imports, for a plain message)
    sys.exit("tempo needs Python 3.10 or later, this is {}.{}".format(*sys.version_info[:2]))

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venv"
WHEEL = "usr/share/python-wheels/pip-*.whl"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # standard output is for the answer alone


def run(*command: object) -> bool:
    """Run a command with its output in the log. Return whether it succeeded."""
    words = [str(word) for word in command]
    env = {"PIP_RETRIES": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **os.environ}
    with open(VENVS / "setup.log", "a", encoding="utf-8") as log:
        print("$", *words, file=log, flush=True)
        return subprocess.call(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env) == 0


def install_pip(python: Path) -> bool:
    """Install a pip that knows dependency groups. Return whether that worked.

    Debian moves ensurepip to python3-venv. Its pip wheel runs as it is, and downloading one needs no root.
    """
    if importlib.util.find_spec("ensurepip"):
        return run(python, "-m", "ensurepip") and run(python, "-m", "pip", "install", "--upgrade", "pip>=25.1")
    with tempfile.TemporaryDirectory() as scratch:
        if not (wheels := list(Path("/").glob(WHEEL))):
            quickly = "-o Acquire::Retries=0 -o Acquire::http::Timeout=15"
            run("sh", "-c", f"cd {scratch} && apt-get {quickly} download python3-pip-whl && dpkg-deb -x *.deb .")
            wheels = list(Path(scratch).glob(WHEEL))
        return bool(wheels) and run(python, f"{wheels[0]}/pip", "install", "pip>=25.1")


def provide(groups: list[str]) -> Path:
    """Install the groups, as far as possible. Return the interpreter to use."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.partition("\n[dependency-groups]\n")[2].partition("\n[")[0]
    digest = hashlib.sha256(table.encode()).hexdigest()
    # Another implementation, or a build without a GIL, has packages of its own.
    home = VENVS / f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = home / "stamp.json"
    made_by = f"{sys.version}, {sys.base_prefix}, {home}"
    held: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        held = json.loads(stamp.read_text(encoding="utf-8"))
    if held.get("made by") != made_by:
        venv.EnvBuilder(symlinks=os.name != "nt", clear=True).create(home)
        held = {"made by": made_by}
    if missing := [group for group in groups if held.get(group) != digest]:
        say(f"setting up {home.relative_to(ROOT)}: {', '.join(missing)}")
        if "pip" in held or install_pip(python):
            held["pip"] = "25.1 or later"
            for group in missing:
                # An older wheel rather than a newer source: small machines have no compiler, nor the time.
                options = ("--quiet", "--no-input", "--prefer-binary", "--group", f"{ROOT / 'pyproject.toml'}:{group}")
                if run(python, "-m", "pip", "install", *options):
                    held[group] = digest
    stamp.write_text(json.dumps(held), encoding="utf-8")
    if lacking := [group for group in groups if held.get(group) != digest]:
        python = Path(sys.executable) if lacking == groups else python
        why = "see .venv/setup.log" if "pip" in held else "no pip: is there a network, or python3-venv?"
        say(f"cannot install {', '.join(lacking)} ({why}); going on with {python}")
    return python


if __name__ == "__main__":
    VENVS.mkdir(exist_ok=True)
    with open(VENVS / "lock", "w", encoding="utf-8") as lock:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)  # two targets of one `make -j` come here at the same time
        print(provide(sys.argv[1:]))
