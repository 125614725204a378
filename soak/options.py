# SPDX-License-Identifier: MIT
"""Command-line habits that all commands share: an error is one line that names the option and the value.

argparse alone prints its usage before each error, takes ``--duration -5s`` for an unknown option, and hides the message
of a converter's ValueError.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

T = TypeVar("T")


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on stderr, with exit code 2. Subcommands get the same class."""

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {line} (--help shows the options)\n")


def attach_values(argv: list[str]) -> list[str]:
    """Write ``--option -value`` as ``--option=-value``, so that a negative value is judged as a value.

    Every long option of every command takes a value, save ``--help``.

    >>> attach_values(["run", "--duration", "-5s", "--help"])
    ['run', '--duration=-5s', '--help']
    """
    attached: list[str] = []
    for word in argv:
        last = attached[-1] if attached else ""
        dashed = word.startswith("-") and not word.startswith("--") and word != "-h"
        if dashed and last.startswith("--") and "=" not in last and last not in ("--", "--help"):
            attached[-1] = f"{last}={word}"
        else:
            attached.append(word)
    return attached


def converter(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Make ``parse`` an argparse type whose ValueError text reaches the user."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def parse_path(text: str) -> Path:
    """Return ``text`` as a path; raise ValueError when it can be none."""
    if not text or "\0" in text:
        raise ValueError(f"{text!r} is not a path")
    return Path(text)


def complain(line: str) -> None:
    """Print one line of trouble on stderr. Where that is full or closed, the exit code alone tells."""
    with contextlib.suppress(OSError):
        print("soak: " + " ".join(line.split()), file=sys.stderr, flush=True)
