# SPDX-License-Identifier: MIT
"""Broken copies of tempo, each with one fault of the kind that a repair or an optimization might bring in."""

from __future__ import annotations

from typing import NamedTuple

from soak.interleave.schedule import SOURCE


class Twin(NamedTuple):
    """A fault: source text that is replaced, once."""

    name: str
    where: str  # part of the names of plans that find it
    old: str
    new: str

    def __str__(self) -> str:
        return f"twin {self.name!r}"

    def source(self) -> str:
        """Return the twin's text. Raises ValueError when the old text does not stand in tempo.py exactly once."""
        text = SOURCE.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self}: {text.count(self.old)} times in tempo.py: {self.old!r}")
        return text.replace(self.old, self.new)


TWINS = [
    Twin("seal not withdrawn", "flush / enqueue in 'open", "run.places = 0  # first: who", "pass  # who"),
    Twin("late payload not looked for", "enqueue / stats in 'open",
         "run is not None and waiter.line is None and not run.withdraw([data])", "False"),
    Twin("late payloads of a list not looked for", "enqueue_many / stats in 'open",
         "if len(run) > run.places:", "if False:"),
    Twin("commit done twice", "interrupt inside enqueue in 'empty'", "self.pieces[at:] = new", "self.pieces += new"),
    Twin("signal between the check and the store", "enqueue inside enqueue in 'one short of the buffer'",
         "granted * run.covers + self.pending\n", "granted * run.covers + self.pending\n        held = int(held)\n"),
    Twin("wake-up of a consumer dropped", "enqueue / enqueue in 'one short of a batch' with",
         "_wake(self._consumers, idle)", "pass"),
    Twin("wake-up of a drain dropped", "flush / get in 'open", "_wake(self._drainers, [", "tuple(["),
    Twin("turn not given", "enqueue waiting / get in 'full",
         "_wake(self._resting, list(self._resting)[:turns])", "pass"),
    Twin("phase changed before the seal", "in 'shutting down'",
         "buffer.seal(self._now)  # first: with the credit gone, a nested call goes by the phase\n        if instead",
         "if instead"),
    Twin("user of a loop read twice", "flush / stop in 'empty' with",
         "(reference := self._user) and reference()", "self._user and self._user()"),
    Twin("nested payload of a stop not counted", "enqueue inside stop in 'open",
         "buffer.seal(self._now)  # again: a", "pass  # a"),
    Twin("what a nested call leaves is not looked for again", "enqueue inside stats in 'empty' with",
         "if not self._left:\n                return", "if True:\n                return"),
    Twin("nested call does not close the run", "enqueue two inside flush in 'closed",
         "run.places = 0  # what follows stays behind these payloads\n        run.granted = granted =", "granted ="),
]  # fmt: skip
