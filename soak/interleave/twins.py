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


TWINS = [
    Twin(
        "seal not withdrawn",
        "        run.places = 0  # first: who sees another value appended before the slice\n",
        "",
        "flush / enqueue in 'open batch",
    ),
    Twin(
        "late payload not looked for",
        "        if late and not buffer.withdraw(late.pop(), data):\n            return True\n",
        "        late.clear()\n",
        "enqueue / stats in 'open batch",
    ),
    Twin(
        "commit before store",
        "                (last or self._pack(items, total)).append(new, sizes, charge)\n",
        """                self.run = _Run(items + n, total + charge, first, base, due, served)
                (last or self._pack(items, total)).append(new, sizes, charge)
""",
        "interrupt inside enqueue in",
    ),
    Twin(
        "claim not published",
        "        run.claim = charge  # first: a nested call must see it, or be seen\n        if self._ceiling(run) > self.max_buffered:\n",
        "        if self._ceiling(run) + charge > self.max_buffered:\n",
        "enqueue inside enqueue in 'one short of the buffer'",
    ),
    Twin(
        "wake-up of a consumer dropped",
        "                if waiter.wake():\n                    self._called",
        "                if True:\n                    self._called",
        "enqueue / enqueue in 'one short of a batch' with",
    ),
    Twin(
        "wake-up of a drain dropped",
        "                waiter.wake()\n                self._drainers.remove(waiter)\n",
        "                self._drainers.remove(waiter)\n",
        "flush / get in 'open batch",
    ),
    Twin(
        "turn not given",
        "        if turns:\n            _wake(self._resting, turns)\n",
        "        if turns < 0:\n            _wake(self._resting, turns)\n",
        "enqueue waiting / get in 'full",
    ),
    Twin(
        "phase changed before the seal",
        "        buffer.seal(_monotonic())  # first: with the credit gone, a nested call goes by the phase\n        if instead",
        "        if instead",
        "shutting down",
    ),
    Twin(
        "nested payload of a stop not counted",
        "        buffer.seal(_monotonic())  # again: a nested call may have come before it saw the phase\n",
        "",
        "enqueue inside stop in 'open batch",
    ),
    Twin(
        "what a nested call leaves is not looked for again",
        "            if not self._left:\n                return\n",
        "            return\n",
        "enqueue inside stats in 'empty' with",
    ),
    Twin(
        "nested call does not close the run",
        "            run.places = 0  # what follows stays behind this payload\n            run.granted = min(run.granted, len(run))\n",
        "",
        "enqueue two inside flush in 'closed batch",
    ),
]


def find(twin: Twin) -> tuple[str, str | None]:
    """Walk a twin until something breaks; return its name, and where that was (None: nowhere)."""
    schedule = Schedule(twin.source())
    for plan in walk.PLANS:
        for outcome in walk.walk(schedule, plan) if twin.where in str(plan) else ():
            if isinstance(outcome, str):
                return twin.name, outcome
    return twin.name, None
