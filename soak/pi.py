# SPDX-License-Identifier: MIT
"""The ``pi`` command: another command on a Raspberry Pi's processor.

On a Raspberry Pi it runs there. Elsewhere apt fetches Debian's arm64 Python into a cache within the project, its
signatures checked, and it runs under ``qemu-aarch64 -cpu cortex-a72``, the Pi 4's core. That is emulation: about ten
times slower than this machine, slower than a real Pi, and named so in every result.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from soak import environment
from soak.debian import SetupError, check_tools, fetch
from soak.options import complain
from soak.progress import say

ROOT = environment.ROOT
CACHE = ROOT / ".cache" / "pi"
"""Removed by ``make clean``."""
OUT = "soak/out/pi"
EMULATOR = "qemu-aarch64-static"
CPU = "cortex-a72"
COMMANDS = ("run", "tune", "stress", "baseline")

EXAMPLE = """\
examples:
  python3 -m soak pi
  python3 -m soak pi tune --payload 1KiB
  python3 -m soak pi run --duration 30s --producers 8

What follows the command are its options; its results go to soak/out/pi unless --out says else.
exit code: that of the command, or 1 when there is no Pi and no emulation
"""


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of ``python3 -m soak``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "pi",
        help="the same on a Raspberry Pi's processor: on one, or emulated",
        description="Run a command here when this is a Raspberry Pi, else under an emulated Cortex-A72.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(main=main, parser=parser)
    parser.add_argument("of", nargs="?", choices=COMMANDS, default="run", help="which command (%(default)s)")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its options")


def main(options: argparse.Namespace) -> int:
    """Run the command where it belongs; return its exit code."""
    words = [options.of, *options.rest]
    machine = environment.machine()
    if machine.startswith("Raspberry Pi"):
        say(f"pi: this is one, {machine}: not emulated")
        from soak.__main__ import main as here  # noqa: PLC0415 - it imports this module

        return here(words)
    try:
        emulator, root = provide()
        python = interpreter(root)
    except SetupError as error:
        complain(str(error))
        return 1
    except OSError as error:
        complain(f"cannot write {str(error.filename or CACHE)!r}: {error.strerror or error}; nothing can be emulated")
        return 1
    if not any(word.partition("=")[0] == "--out" for word in words) and options.of != "baseline":
        words += ["--out", OUT]
    say(f"pi: this is {machine}; emulated: {EMULATOR} -cpu {CPU}, Debian's arm64 {python.name}")
    # Ctrl-C at a terminal reaches both, and SIGTERM is passed on: what is emulated ends in its own way, and is waited
    # for. A handler, unlike SIG_IGN, is not handed down to it.
    running: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: object) -> None:
        for process in running:
            process.send_signal(number)

    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: pass_on}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with subprocess.Popen(
            [str(emulator), "-cpu", CPU, "-L", str(root), str(python), "-m", "soak", *words],
            cwd=ROOT,
            env={**os.environ, environment.EMULATED: f"Cortex-A72, emulated by qemu-user on {machine}"},
        ) as emulated:
            running.append(emulated)
            return emulated.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def provide() -> tuple[Path, Path]:
    """Return the emulator and the folder with arm64's Python, fetched when they are not there yet.

    Raises: SetupError.
    """
    root, done = CACHE / "root", CACHE / "done"
    found = shutil.which(EMULATOR) or shutil.which(EMULATOR, path=str(CACHE / "host" / "usr" / "bin"))
    if found and done.exists():
        return Path(found), root
    check_tools()
    if not found:
        say(f"pi: fetching {EMULATOR}")
        fetch(["qemu-user-static"], CACHE / "host")
        found = str(CACHE / "host" / "usr" / "bin" / EMULATOR)
    if not done.exists():
        say("pi: fetching Debian's arm64 python3")
        shutil.rmtree(root, ignore_errors=True)
        fetch(["python3"], root, architecture="arm64")
        # Debian 12's packages still know /lib and /bin as folders of their own; their loader is looked for there.
        interpreter(root)
        done.touch()
    return Path(found), root


def interpreter(root: Path) -> Path:
    """Return the Python in a folder. Raises SetupError when there is none."""
    found = sorted((root / "usr" / "bin").glob("python3.[0-9]*[0-9]"))
    if not found:
        raise SetupError(f"no python3 in {root}")
    return found[-1]
