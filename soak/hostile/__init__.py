# SPDX-License-Identifier: MIT
"""Cases that try to break tempo, each in a process of its own with a time limit.

A case is a function that takes a scale (1.0 is the whole case, less is a sample of it) and returns how many times it
tried. It raises when tempo hung, lost, repeated or reordered something, or went on half done, and `LeftOut` when this
machine or interpreter cannot do it. Its process must end with exit code 0 and nothing on stderr.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

FAMILIES = {
    "callers": "hostile callers",
    "forks": "fork and exit",
    "worlds": "other worlds",
    "misuse": "misuse",
}


class LeftOut(Exception):
    """This machine or interpreter cannot do the case; the message says why."""


class Case(NamedTuple):
    """One way to try to break tempo."""

    family: str  # a key of FAMILIES, and the module of this package that it is in
    name: str
    run: Callable[[float], int]
    limit: float  # seconds at scale 1 after which it hangs


CASES: dict[str, Case] = {}


def case(limit: float = 60.0) -> Callable[[Callable[[float], int]], Callable[[float], int]]:
    """Register a function as a case of the family that its module is named after."""

    def register(run: Callable[[float], int]) -> Callable[[float], int]:
        family = run.__module__.rpartition(".")[2]
        assert family in FAMILIES, family
        assert run.__name__ not in CASES, run.__name__
        CASES[run.__name__] = Case(family, run.__name__, run, limit)
        return run

    return register


def times(n: int, scale: float) -> int:
    """How many of n repetitions a scale asks for: at least one."""
    return max(1, round(n * scale))


def cases(families: list[str]) -> Iterator[Case]:
    """All cases of the families, in the order in which they stand in their modules."""
    for found in CASES.values():
        if found.family in families:
            yield found
