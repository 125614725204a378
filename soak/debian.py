# SPDX-License-Identifier: MIT
"""Debian's packages, fetched and unpacked into a cache within the project, by any user: nothing is installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


class SetupError(Exception):
    """Why what is needed cannot be had, in one line."""


def fetch(packages: Sequence[str], into: Path, architecture: str | None = None) -> None:
    """Fetch packages and all that they depend on, with their signatures checked, and unpack them. Raises SetupError.

    apt keeps its state next to ``into`` and knows of no installed package: so it fetches all of them.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SetupError(f"no {tool} here: what is missing would be fetched from Debian")
    log, state = into.with_name(f"{into.name}.log"), into.with_name(f"{into.name}.apt")
    try:
        for folder in (into, state / "lists" / "partial", state / "archives" / "partial"):
            folder.mkdir(parents=True, exist_ok=True)
        log.write_text("", encoding="utf-8")
        (state / "status").touch()
    except OSError as error:
        raise SetupError(f"cannot write {str(error.filename)!r}: {error.strerror}") from None
    options = {"State": state, "State::status": state / "status", "Cache": state, "Cache::archives": state / "archives"}
    own = [word for name, value in options.items() for word in ("-o", f"Dir::{name}={value}")]
    if architecture is not None:
        own += ["-o", f"APT::Architecture={architecture}", "-o", f"APT::Architectures={architecture}"]
    _call(["apt-get", "-q", *own, "update"], log)
    _call(["apt-get", "-q", "-y", *own, "--no-install-recommends", "--download-only", "install", *packages], log)
    archives = sorted((state / "archives").glob("*.deb"))
    if not archives:
        raise SetupError(f"apt-get fetched nothing for {', '.join(packages)}")
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
