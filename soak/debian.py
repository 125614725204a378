# SPDX-License-Identifier: MIT
"""Debian's packages, fetched and unpacked into a cache within the project, by any user: nothing is installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from soak.cli import Failure, say


class SetupError(Failure):
    """Why what is needed cannot be had, in one line."""


def fetch(packages: Sequence[str], into: Path, architecture: str | None = None) -> None:
    """Fetch packages and all that they depend on, with their signatures checked, and unpack them, if not done yet.

    Raises SetupError. apt keeps its state next to ``into`` and knows of no installed package: so it fetches all.
    """
    done = into.with_name(f"{into.name}.done")
    if done.exists():
        return
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SetupError(f"no {tool} here: what is missing would be fetched from Debian")
    say(f"fetching {', '.join(packages)} from Debian into {into}")
    shutil.rmtree(into, ignore_errors=True)
    log, state = into.with_name(f"{into.name}.log"), into.with_name(f"{into.name}.apt")
    try:
        for folder in (into, state / "lists" / "partial", state / "archives" / "partial"):
            folder.mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        output = open(log, "wb")  # noqa: SIM115
    except OSError as error:
        raise SetupError(f"cannot write {str(error.filename)!r}: {error.strerror}") from None
    options = {"State": state, "State::status": state / "status", "Cache": state, "Cache::archives": state / "archives"}
    apt = ["apt-get", "-q", "-y", *(f"-oDir::{name}={value}" for name, value in options.items())]
    if architecture is not None:
        apt += [f"-oAPT::Architecture={architecture}", f"-oAPT::Architectures={architecture}"]

    def call(*command: str) -> None:
        code = subprocess.call(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        if code:
            raise SetupError(f"{command[0]} failed with exit code {code}: no network? (see {log})")

    with output:
        call(*apt, "update")
        call(*apt, "--no-install-recommends", "--download-only", "install", *packages)
        for archive in sorted((state / "archives").glob("*.deb")):
            call("dpkg-deb", "-x", str(archive), str(into))
    shutil.rmtree(state)
    done.touch()
