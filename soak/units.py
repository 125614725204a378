# SPDX-License-Identifier: MIT
"""Sizes, times and counts as people write them. A parser raises ValueError with a text that names the value."""

from __future__ import annotations

import re
import sys
import threading
from fractions import Fraction

KIB = 1024
MIB = 1024 * KIB

_SIZE_UNITS = {"": 1, "B": 1, "KiB": KIB, "MiB": MIB, "GiB": 1024 * MIB}
_TIME_UNITS = {
    "ns": Fraction(1, 10**9),
    "us": Fraction(1, 10**6),
    "µs": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
}
# At most 18 digits a number: enough for any real value, and out of reach of the int() digit limit.
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)(|B|KiB|MiB|GiB)")
_TIME_PART = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)(ns|us|µs|ms|s|m|h)")
_COUNT = re.compile(r"[0-9]{1,18}")


def parse_size(text: str, *, least: int = 1) -> int:
    """Return ``text`` in bytes: a whole number of bytes, of at least ``least``; units B (or none), KiB, MiB, GiB.

    >>> parse_size("320KiB"), parse_size("1.5MiB"), parse_size("64")
    (327680, 1572864, 64)
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size (such as 64, 64B, 320KiB, 2MiB, 1GiB)")
    size = Fraction(match.group(1)) * _SIZE_UNITS[match.group(2)]
    if size.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    if size < least:
        raise ValueError(f"{text!r} is too small: at least {least} byte{'s' * (least != 1)}")
    if size > sys.maxsize:
        raise ValueError(f"{text!r} is more than this machine can address")
    return int(size)


def parse_duration(text: str, *, zero: bool = False) -> float:
    """Return ``text`` in seconds, finite and above 0 (or 0 too, when ``zero``); a unit is needed, save for a bare 0.

    Parts add up as in "1m30s"; units are ns, us, ms, s, m, h.

    >>> parse_duration("5m"), parse_duration("1m30s"), parse_duration("10us")
    (300.0, 90.0, 1e-05)
    """
    total = Fraction(0)
    position = 0
    while position < len(text):
        match = _TIME_PART.match(text, position)
        if match is None:
            break
        total += Fraction(match.group(1)) * _TIME_UNITS[match.group(2)]
        position = match.end()
    if (position < len(text) or not text) and text != "0":
        raise ValueError(f"{text!r} is not a time with its unit (such as 10us, 10ms, 30s, 5m, 1h30m)")
    if total == 0 and not zero:
        raise ValueError(f"{text!r} is too small: a time above 0")
    if total > Fraction(threading.TIMEOUT_MAX):
        raise ValueError(f"{text!r} is longer than this machine can wait")
    seconds = float(total)
    return seconds


def parse_count(text: str, *, most: int) -> int:
    """Return ``text`` as a whole number from 1 to ``most``.

    >>> parse_count("32", most=9999)
    32
    """
    if _COUNT.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not a whole number from 1 to {most}")
    count = int(text)
    if not 1 <= count <= most:
        raise ValueError(f"{text!r} is out of range: a whole number from 1 to {most}")
    return count


def format_size(size: float) -> str:
    """Return a size in bytes as text for people.

    >>> format_size(163), format_size(327680), format_size(3670016)
    ('163 B', '320.0 KiB', '3.50 MiB')
    """
    if size < KIB:
        return f"{size:.0f} B"
    if size < MIB:
        return f"{size / KIB:.1f} KiB"
    return f"{size / MIB:.2f} MiB"


def format_seconds(seconds: float | None) -> str:
    """Return a time in seconds as text for people; None is a time that was not measured.

    >>> format_seconds(0.00001), format_seconds(0.0123), format_seconds(90.0), format_seconds(None)
    ('10 us', '12.3 ms', '90.00 s', 'not measured')
    """
    if seconds is None:
        return "not measured"
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1.0:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s"
