# SPDX-License-Identifier: MIT
"""Broken copies of tempo, each with one fault of the kind that a repair or an optimization might bring in."""

from __future__ import annotations

from typing import NamedTuple

from soak.interleave import walk
from soak.interleave.schedule import SOURCE, Schedule


class Twin(NamedTuple):
    """A fault: source text that is replaced, once."""

    name: str
    old: str
    new: str
    where: str  # part of the names of plans that find it

    def source(self) -> str:
        """Return the twin's text. Raises ValueError when the old text does not stand in tempo.py exactly once."""
        text = SOURCE.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"twin {self.name!r}: {text.count(self.old)} times in tempo.py: {self.old!r}")
        return text.replace(self.old, self.new)


TWINS: list[Twin] = []


def find(twin: Twin) -> tuple[str, str | None]:
    """Walk a twin until something breaks; return its name, and where that was (None: nowhere)."""
    schedule = Schedule(twin.source())
    for plan in walk.PLANS:
        for outcome in walk.walk(schedule, plan) if twin.where in str(plan) else ():
            if isinstance(outcome, str):
                return twin.name, outcome
    return twin.name, None
