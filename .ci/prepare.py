# SPDX-License-Identifier: MIT
"""Set up what a make target needs, and print the interpreter to run it with.

    python3 .ci/prepare.py [--optional] EXTRA...

The requirements of the extras (pyproject.toml) go into a virtual environment of the project's, .venv/VERSION, made for
the interpreter that runs this file. Where that fails (no network, no pip), the interpreter itself is printed when it
has the requirements already, or in any case with --optional; else the exit code is 1. What happens is told on standard
error, one line each.

Standard library only, and nothing is assumed beside the interpreter: Debian splits ensurepip off into python3-venv.
"""

import sys

if sys.version_info < (3, 9):  # noqa: UP036  (asked before the first import that an older one has not)
    sys.exit("tempo needs Python 3.9 or later, this is {}.{}".format(*sys.version_info[:2]))

import ast
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import tempfile
import venv
from pathlib import Path
from typing import Any, NoReturn, Optional

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venv"
LOG = VENVS / "setup.log"
DEBIAN_WHEELS = "usr/share/python-wheels"


class SetupError(Exception):
    """Why there is no environment with the requirements, in a few words."""


def say(line: str) -> None:
    # Standard output is for the answer alone.
    print(line, file=sys.stderr, flush=True)


def requirements(extras: list[str]) -> list[str]:
    """Read the extras' requirements from pyproject.toml.

    By hand, because tomllib came with 3.11: a TOML array of strings is a Python literal too.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.split("\n[project.optional-dependencies]\n")[1].split("\n[")[0]
    found: list[str] = []
    for extra in extras:
        array = re.search(rf"^{re.escape(extra)} = (\[.*?\])$", table, re.MULTILINE | re.DOTALL)
        if array is None:
            sys.exit(f"pyproject.toml has no extra {extra!r}")
        found += ast.literal_eval(array[1])
    return found


def distribution(requirement: str) -> str:
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None, requirement
    return name[0]


def names(required: list[str]) -> str:
    return ", ".join(map(distribution, required))


def missing_here(required: list[str]) -> list[str]:
    """Return the requirements that this interpreter has not. Versions are not compared: packaging is no part of it."""
    missing = []
    for requirement in required:
        try:
            importlib.metadata.version(distribution(requirement))
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement)
    return missing


class Environment:
    """The virtual environment for this interpreter.

    The stamp says which interpreter made it and which requirements it holds. It is taken away while the environment
    changes, so that one left half-made by an interruption has none, and is made again.
    """

    def __init__(self) -> None:
        # A free-threaded build and another implementation have packages of their own.
        key = "{}.{}".format(*sys.version_info[:2]) + getattr(sys, "abiflags", "").replace("d", "")
        if sys.implementation.name != "cpython":
            key = sys.implementation.name + key
        self.path = VENVS / key
        self.python = self.path / "bin" / "python"
        self.stamp = self.path / "stamp.json"
        # Two interpreters of one version must not share an environment, nor one before and after its update.
        self.made_by = [sys.version, sys.base_prefix]

    def installed(self) -> Optional[list[str]]:
        """Return what the environment holds, None when it must be made (again)."""
        try:
            stamp: dict[str, Any] = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        if stamp["made_by"] != self.made_by or not self.python.exists():
            return None
        held: list[str] = stamp["installed"]
        return held

    def write_stamp(self, installed: list[str]) -> None:
        self.stamp.write_text(json.dumps({"made_by": self.made_by, "installed": installed}), encoding="utf-8")

    def provide(self, required: list[str]) -> None:
        """Make the environment hold the requirements. Quick, and without the network, when it does.

        Raises: SetupError when it cannot be done; what the environment held before, it holds still.
        """
        VENVS.mkdir(exist_ok=True)
        with open(VENVS / "lock", "w", encoding="utf-8") as lock:
            # Two targets of one `make -j` come here at the same time.
            fcntl.flock(lock, fcntl.LOCK_EX)
            installed = self.installed()
            if installed is None:
                # Without pip: the soak may need no package, and copying pip takes a small machine long.
                venv.EnvBuilder(symlinks=True, clear=True).create(self.path)
                installed = []
                self.write_stamp(installed)
            if not set(required) <= set(installed):
                self.install(required, installed)

    def install(self, required: list[str], installed: list[str]) -> None:
        say(f"setting up {self.path.relative_to(ROOT)}: {names(required)}")
        site = next(self.path.glob("lib*/*/site-packages"))
        with tempfile.TemporaryDirectory() as scratch, open(LOG, "w", encoding="utf-8") as log:
            self.stamp.unlink()
            pip = self.pip(site, scratch, log)
            before = sorted(os.listdir(site))
            # An older wheel rather than a newer source: small machines have no compiler, nor the time.
            options = ["--prefer-binary", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
            done = pip and run([*pip, "install", *options, *required], log)
        if done:
            self.write_stamp(sorted({*installed, *required}))
            return
        if before == sorted(os.listdir(site)):
            # It failed before it changed anything, as it does when a download fails.
            self.write_stamp(installed)
        if pip is None:
            raise SetupError("python3-venv is missing: sudo apt install python3-venv")
        raise SetupError(f"pip could not install {names(required)}: no network? (see {LOG.relative_to(ROOT)})")

    def pip(self, site: Path, scratch: str, log: Any) -> Optional[list[str]]:
        """Return the command that is pip for the environment, None when there is none to be had."""
        if (site / "pip").exists():
            return [str(self.python), "-m", "pip"]
        if importlib.util.find_spec("ensurepip"):
            return [str(self.python), "-m", "pip"] if run([str(self.python), "-m", "ensurepip"], log) else None
        if importlib.util.find_spec("pip"):
            version = importlib.metadata.version("pip").split(".")
            if (int(version[0]), int(version[1])) >= (22, 3):  # the first with --python
                return [sys.executable, "-m", "pip", "--python", str(self.python)]
        # Debian's own pip wheel, which its ensurepip uses, runs as it lies. Fetching it needs no root.
        wheels = sorted(Path("/", DEBIAN_WHEELS).glob("pip-*.whl"))
        if not wheels:
            quick = ["-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=15", "-o", "Acquire::https::Timeout=15"]
            if run(["apt-get", *quick, "download", "python3-pip-whl"], log, cwd=scratch):
                for package in Path(scratch).glob("*.deb"):
                    run(["dpkg-deb", "-x", str(package), scratch], log)
            wheels = sorted(Path(scratch, DEBIAN_WHEELS).glob("pip-*.whl"))
        return [str(self.python), f"{wheels[-1]}/pip"] if wheels else None


def run(command: list[str], log: Any, cwd: Optional[str] = None) -> bool:
    """Run a command with its output in the log. True when it succeeded."""
    log.write("$ " + " ".join(command) + "\n")
    log.flush()
    # pip's five retries make a machine without a network wait; two tries tell as much.
    environment = {"PIP_RETRIES": "1", **os.environ}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=cwd, check=False
        )
    except FileNotFoundError:
        log.write("no such command\n")
        return False
    return done.returncode == 0


def main(arguments: list[str]) -> NoReturn:
    optional = arguments[:1] == ["--optional"]
    required = requirements(arguments[optional:])
    environment = Environment()
    try:
        environment.provide(required)
    except (SetupError, OSError) as error:
        missing = missing_here(required)
        if missing and not optional:
            sys.exit(f"missing: {names(missing)}; {error}")
        say(f"{error}; going on with {sys.executable} " + (f"without {names(missing)}" if missing else "as it is"))
        print(sys.executable)
    else:
        print(environment.python)
    sys.exit(0)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
