# SPDX-License-Identifier: MIT
"""Debian's packages, fetched and unpacked into a cache within the project, by any user: nothing is installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


class SetupError(Exception):
    """Why what is needed cannot be had, in a line."""


def check_tools() -> None:
    """Raise SetupError when this is no Debian."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SetupError(f"no {tool} here: what is missing would be fetched from Debian")


def fetch(packages: Sequence[str], into: Path, architecture: str | None = None) -> None:
    """Fetch packages and all that they depend on, their signatures checked, and unpack them. Raises SetupError.

    apt keeps its state beside ``into``, and knows of no package that is installed: so it fetches all of them.
    """
    check_tools()
    into.parent.mkdir(parents=True, exist_ok=True)
    log = into.parent / f"{into.name}.log"
    log.write_text("", encoding="utf-8")
    state = into.parent / f"{into.name}.apt"
    for folder in ("lists/partial", "archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    own = ["-o", f"Dir::State={state}", "-o", f"Dir::State::status={state / 'status'}", "-o", f"Dir::Cache={state}"]
    own += ["-o", f"Dir::Cache::archives={state / 'archives'}"]
    if architecture is not None:
        own += ["-o", f"APT::Architecture={architecture}", "-o", f"APT::Architectures={architecture}"]
    _call(["apt-get", "-q", *own, "update"], log)
    _call(["apt-get", "-q", "-y", *own, "--no-install-recommends", "--download-only", "install", *packages], log)
    archives = sorted((state / "archives").glob("*.deb"))
    if not archives:
        raise SetupError(f"apt-get fetched nothing for {', '.join(packages)}")
    into.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        _call(["dpkg-deb", "-x", str(archive), str(into)], log)
    shutil.rmtree(state)


def _call(command: Sequence[str], log: Path) -> None:
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False)
    if done.returncode:
        raise SetupError(f"{command[0]} failed with exit code {done.returncode}: no network? (see {log})")
