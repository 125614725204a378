# SPDX-License-Identifier: MIT
"""The ``pi`` command: another command on a Raspberry Pi's processor.

On a Raspberry Pi it runs there. Elsewhere apt fetches Debian's arm64 Python into a cache within the project, and it
runs under ``qemu-aarch64 -cpu cortex-a72``, the Pi 4's core. That is emulation: about ten times slower than this
machine, slower than a real Pi, and every result says so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

from soak import cli, environment
from soak.cli import say
from soak.debian import SetupError, fetch

ROOT = environment.ROOT
CACHE = ROOT / ".cache" / "pi"
OUT = "soak/out/pi"
EMULATOR, CPU = "qemu-aarch64-static", "cortex-a72"

EXAMPLE = """\
examples:
  python3 -m soak pi
  python3 -m soak pi tune --payload 1KiB
  python3 -m soak pi run --duration 30s --producers 8

What follows the command are its options; its results go to soak/out/pi unless --out says otherwise.
"""


def add_parser(commands: Any) -> None:
    purpose = "Run a command here when this is a Raspberry Pi, otherwise under an emulated Cortex-A72."
    add = cli.add_command(commands, "pi", main, purpose, EXAMPLE)
    add("of", nargs="?", choices=("run", "tune", "stress", "baseline"), default="run", help="which (%(default)s)")
    add("rest", nargs=argparse.REMAINDER, metavar="...", help="its options")


def main(options: argparse.Namespace) -> NoReturn:
    """Become the command, where it belongs. Raises SetupError."""
    words = ["-m", "soak", options.of, *options.rest]
    machine = environment.machine()
    if machine.startswith("Raspberry Pi"):
        say(f"pi: this is one, {machine}: not emulated")
        run([sys.executable, *words], dict(os.environ))
    emulator, root, python = provide()
    if not any(word.partition("=")[0] == "--out" for word in options.rest) and options.of != "baseline":
        words += ["--out", OUT]
    say(f"pi: this is {machine}; emulated: {EMULATOR} -cpu {CPU}, Debian's arm64 {python.name}")
    emulated = {environment.EMULATED: f"Cortex-A72, emulated by qemu-user on {machine}"}
    run([str(emulator), "-cpu", CPU, "-L", str(root), str(python), *words], {**os.environ, **emulated})


def run(command: list[str], variables: dict[str, str]) -> NoReturn:
    """Become another program, so that it alone gets Ctrl-C and signals, and has the exit code."""
    os.chdir(ROOT)
    os.execvpe(command[0], command, variables)


def provide() -> tuple[Path, Path, Path]:
    """Return the emulator, a folder with arm64's files, and its Python; fetch what is missing. Raises SetupError."""
    root, host = CACHE / "root", CACHE / "host"
    found = shutil.which(EMULATOR)
    if found is None:
        fetch(["qemu-user-static"], host)
    fetch(["python3"], root, architecture="arm64")
    python = max((root / "usr" / "bin").glob("python3.[0-9]*[0-9]"), default=None)
    if python is None:
        raise SetupError(f"no python3 in {root}")
    return Path(found or host / "usr" / "bin" / EMULATOR), root, python
