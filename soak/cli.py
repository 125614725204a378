# SPDX-License-Identifier: MIT
"""The command line: one-line errors, argparse types for sizes and times, the same values as text, lines on stderr."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

KIB = 1024
MIB = 1024 * KIB

_SIZE_UNITS = {"": 1, "B": 1, "KiB": KIB, "MiB": MIB, "GiB": 1024 * MIB}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)(|B|KiB|MiB|GiB)", re.ASCII)
_TIME_UNITS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_TIME_PART = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)(ns|us|ms|s|m|h)", re.ASCII)


class Failure(Exception):
    """Why a command comes to nothing, in one line; its exit code is then 1."""


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on stderr, with exit code 2. Subcommands get the same class."""

    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: error: {' '.join(message.split())} (--help shows the options)")
        raise SystemExit(2)


EXIT = """
exit code: 0 all is well (warnings included), 1 something failed, is worse than recorded, or cannot be written, 2 a bad
option, or a tool is missing, 130 interrupted
"""


def add_command(commands: Any, name: str, main: Callable[..., int], purpose: str, examples: str) -> Any:
    """Add a command to the subparsers of ``python3 -m soak``; return its parser's ``add_argument``."""
    texts = {"description": purpose, "epilog": examples + EXIT}
    style = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, **texts, formatter_class=style, allow_abbrev=False)
    parser.set_defaults(main=main, parser=parser)
    return parser.add_argument


# Types of options. Each raises ArgumentTypeError with a text that names the value.


def size(text: str, least: int = 1) -> int:
    """Return a size in bytes, at least ``least``; units are B (or none), KiB, MiB and GiB.

    >>> size("320KiB"), size("1.5MiB"), size("64")
    (327680, 1572864, 64)
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size (such as 64, 64B, 320KiB, 2MiB, 1GiB)")
    value = (float(match[1]) if "." in match[1] else int(match[1])) * _SIZE_UNITS[match[2]]
    if value != int(value) or not least <= value <= sys.maxsize:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of bytes from {least} to {sys.maxsize}")
    return int(value)


def size_or_none(text: str) -> int | None:
    """Return a size in bytes, or None for ``none``."""
    return None if text == "none" else size(text)


def duration(text: str, zero: bool = False) -> float:
    """Return a time in seconds, above 0 (with ``zero``: 0 too). A unit is required, except for 0; parts add up.

    >>> duration("5m"), duration("1m30s"), duration("10us")
    (300.0, 90.0, 1e-05)
    """
    parts = _TIME_PART.findall(text)
    if text != "0" and (not parts or "".join(number + unit for number, unit in parts) != text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time with its unit (such as 10us, 10ms, 30s, 5m, 1h30m)")
    seconds = sum(float(number) * _TIME_UNITS[unit] for number, unit in parts) / 1e9
    if not (seconds > 0 or zero) or seconds > threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range: 0 to {threading.TIMEOUT_MAX:.0f} s")
    return seconds


def duration_or_zero(text: str) -> float:
    """Return a time in seconds, 0 or more."""
    return duration(text, zero=True)


def count(most: int) -> Callable[[str], int]:
    """Return the type of whole numbers from 1 to ``most``."""

    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {most}")
        return int(text)

    return parse


def names(*known: str) -> Callable[[str], tuple[str, ...]]:
    """Return the type of comma-separated selections of ``known``; ``all`` and ``none`` are short for these."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = {"all": known, "none": ()}.get(text, tuple(text.split(",")))
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return chosen

    return parse


def path(text: str) -> Path:
    """Return a path."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path")
    return Path(text)


# Text for people.


def format_size(value: float | None) -> str:
    """Return a size in bytes as text; None was not measured.

    >>> format_size(163), format_size(327680), format_size(3670016), format_size(None)
    ('163 B', '320.0 KiB', '3.50 MiB', 'not measured')
    """
    if value is None:
        return "not measured"
    if value < KIB:
        return f"{value:.0f} B"
    return f"{value / KIB:.1f} KiB" if value < MIB else f"{value / MIB:.2f} MiB"


def format_seconds(seconds: float | None) -> str:
    """Return a time in seconds as text; None was not measured.

    >>> format_seconds(4.2e-7), format_seconds(1e-5), format_seconds(0.0123), format_seconds(90), format_seconds(1800)
    ('420 ns', '10 us', '12.3 ms', '90.00 s', '30.0 min')
    """
    if seconds is None:
        return "not measured"
    if 0 < seconds < 0.00001:
        return f"{seconds * 1e9:,.0f} ns"
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1.0:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 600 else f"{seconds / 60:.1f} min"


def say(line: str) -> None:
    """Print one line on stderr. Where that is full or closed, nobody can be told."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def complain(line: str) -> None:
    """Print one line of trouble on stderr."""
    say("soak: " + " ".join(line.split()))
