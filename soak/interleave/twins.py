# SPDX-License-Identifier: MIT
"""Broken copies of tempo, each with one fault of the kind that a mend, or a quicker way, might bring in."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from soak.interleave import walk

SOURCE = Path(__file__).resolve().parent.parent.parent / "tempo.py"


class Twin(NamedTuple):
    """A fault: source text that is replaced, once."""

    name: str
    old: str
    new: str
    where: str  # part of the name of plans that find it, for a quick look


TWINS: list[Twin] = [
    Twin(
        "the length is looked at before the append, and not again",
        """                    inbox.append(payload)
                    if len(inbox) <= s.places and len(payload) <= s.covers:""",
        """                    covered = len(inbox) < s.places and len(payload) <= s.covers
                    inbox.append(payload)
                    if covered:""",
        "enqueue / stop in 'plenty",
    ),
    Twin(
        "credit is given though no payload is in the open batch",
        """        if first == items:
            return
        places = min(""",
        """        places = min(""",
        "with a consumer",
    ),
    Twin(
        "the credit is not withdrawn by the count",
        """        s.places = 0
        inbox = s.inbox
        # From here on""",
        """        inbox = s.inbox
        # From here on""",
        "get / enqueue in 'plenty",
    ),
    Twin(
        "empty places are not taken back by the count",
        "        header = self._narrow_locked(s) if len(inbox) < inbox[0][3] else inbox[0]\n",
        "        header = inbox[0]\n",
        "get / enqueue in 'plenty",
    ),
    Twin(
        "the count swaps the list under the producers' feet",
        "                inbox[:n] = [header]\n",
        "                s.inbox = [header, *inbox[n:]]\n",
        "enqueue / get in 'plenty",
    ),
    Twin(
        "a commit does not notice that the inbox has grown",
        """            try:
                inbox[::-1] = [*pending, header]  # fails""",
        """            try:
                inbox[:] = [header, *reversed(pending)]  # fails""",
        "enqueue / enqueue in 'empty'",
    ),
    Twin(
        "a late payload goes the exact way though it was counted",
        """        if not self._withdraw_locked(s, late):
            return None
""",
        """        self._withdraw_locked(s, late)
""",
        "enqueue / stats in 'one short of the buffer' with",
    ),
    Twin(
        "a consumer is not told of a batch",
        """        if s.consumers:
            self._signal_locked(s)
""",
        "",
        "with a consumer",
    ),
    Twin(
        "a wake-up is taken for one that came before",
        """            self.woken = False
            self._ready.acquire(False)
""",
        """            self._ready.acquire(False)
""",
        "flush / shutdown in 'full, one waits' with",
    ),
    Twin(
        "who makes room does not serve those who wait for it",
        """        if s.producers and s.phase is _RUNNING:
            self._serve_locked(s)
        if s.resting:""",
        """        if s.resting:""",
        "enqueue / get in 'full batch",
    ),
    Twin(
        "producers that wait are not told of the end",
        "                for parker in chain(s.producers, s.consumers, s.drainers):",
        "                for parker in chain(s.consumers, s.drainers):",
        "stop in 'full, one waits'",
    ),
    Twin(
        "who waits for the drain is not told of it",
        """        for parker in s.drainers:
            if self._delivered(s, parker.target):
                parker.wake()
""",
        "",
        "flush / get in 'full batch",
    ),
    Twin(
        "credit goes on behind the open batch while a consumer waits",
        "            if near < places:\n",
        "            if near < 0:\n",
        "enqueue / enqueue in 'one short of a batch' with",
    ),
    Twin(
        "credit is given while producers wait for room",
        "        if s.producers or s.phase is not _RUNNING or (",
        "        if s.phase is not _RUNNING or (",
        "get / enqueue in 'full batch",
    ),
    Twin(
        "a consumer that waits sets no timer",
        "                delay = max(0.0, born + self._interval - self._clock())\n",
        "                pass\n",
        "wait / enqueue in 'plenty",
    ),
    Twin(
        "enqueue_many does not look whether it is the end",
        "        if s.phase is not _RUNNING or (wait and s.producers):",
        "        if wait and s.producers:",
        "enqueue_many / stop in 'shutting",
    ),
]
"""None of them can be seen by calls that are made one after the other, except where they make a call wait for ever."""


def broken(twin: Twin) -> ModuleType:
    """Make the twin: a module of its own."""
    source = SOURCE.read_text(encoding="utf-8")
    assert source.count(twin.old) == 1, f"{twin.name}: {twin.old!r} stands {source.count(twin.old)} times in tempo.py"
    module = ModuleType("tempo_twin")
    sys.modules[module.__name__] = module  # typing looks there
    exec(compile(source.replace(twin.old, twin.new), f"<tempo, {twin.name}>", "exec"), module.__dict__)
    return module


def find(name: str, quick: bool = False) -> str | None:
    """Walk a twin, plan by plan in a random order, until something breaks; return where, or None.

    quick: only plans of two calls in which it is known to be found.
    """
    twin = next(twin for twin in TWINS if twin.name == name)
    module = broken(twin)
    plans = [plan for plan in walk.PLANS if twin.where in str(plan)] if quick else [*walk.PLANS, *walk.DEEP]
    assert plans, twin
    if not quick:
        random.Random(name).shuffle(plans)
        plans.sort(key=lambda plan: len(plan.calls))
    for plan in plans:
        for outcome in walk.walk(module, plan):
            if isinstance(outcome, walk.Failure):
                return str(outcome)
    return None
