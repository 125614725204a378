# SPDX-License-Identifier: MIT
"""Recorded figures under ``soak/baselines/``, and which of them a run may be compared with.

A file with ``ratio`` and ``ratio_spread`` is a baseline: what a run of this harness reached in events/s over the
calibration of the same run, and how far from that another may be; likewise its peak heap and its drain. A file without
them is a record: shown beside a result, never compared with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "baselines"

MACHINE_KEYS = ("machine", "cores", "interpreter")
"""What must be equal in the environments for ``auto`` to compare."""
SETTING_KEYS = (
    "producers",
    "consumers",
    "payload",
    "interval",
    "max_batch_bytes",
    "max_buffered_bytes",
    "consumer_delay",
    "on_full",
    "bulk",
    "sink",
)
"""What must be equal in the settings: all but the duration."""


COMPARED = ("ratio", "peak_heap_bytes", "drain_seconds")
"""What is compared, where a baseline has it and its spread."""


@dataclass(frozen=True)
class Baseline:
    """One recorded file."""

    name: str
    content: Mapping[str, object]

    def expected(self, key: str) -> tuple[str, float, float] | None:
        """Return the name, the figure of this key and its spread; None when it is not recorded."""
        figure, spread = self.content.get(key), self.content.get(f"{key}_spread")
        if isinstance(figure, (int, float)) and isinstance(spread, (int, float)):
            return self.name, float(figure), float(spread)
        return None

    def fits(self, config: Mapping[str, object], environment: Mapping[str, object]) -> bool:
        """Return whether this is a baseline of the same machine, interpreter and settings."""
        return self.expected("ratio") is not None and not self.differences(config, environment)

    def differences(self, config: Mapping[str, object], environment: Mapping[str, object]) -> list[str]:
        """Return which of the keys above differ."""
        pairs = (("environment", environment, MACHINE_KEYS), ("config", config, SETTING_KEYS))
        different = []
        for part, ours, keys in pairs:
            theirs = self.content.get(part)
            theirs = theirs if isinstance(theirs, dict) else {}
            different += [key for key in keys if theirs.get(key) != ours.get(key)]
        return different

    def record(self) -> str | None:
        """Return the best figure of a record in words; None when it holds none."""
        runs = self.content.get("runs")
        rates = [run.get("delivered_per_second") for run in runs] if isinstance(runs, list) else []
        rates = [rate for rate in rates if isinstance(rate, (int, float))]
        return f"{self.content.get('what')}: {max(rates):,.0f}/s on {self.content.get('machine')}" if rates else None


@dataclass(frozen=True)
class Choice:
    """The baseline that a run is compared with, or the reason for none."""

    baseline: Baseline | None
    note: str


def names(folder: Path = FOLDER) -> list[str]:
    """Return the names that ``--baseline`` takes beside auto and none."""
    return sorted(path.stem for path in folder.glob("*.json"))


def load(name: str, folder: Path = FOLDER) -> Baseline:
    """Read one baseline. Raises ValueError, with a text for the user, when there is no such file or it is not JSON."""
    if name not in names(folder):
        raise ValueError(f"{name!r} is not a baseline (there are: auto, none, {', '.join(names(folder))})")
    try:
        content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r}: the baseline cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name!r}: the baseline is not a JSON object")
    return Baseline(name, content)


def parse_baseline(text: str, folder: Path = FOLDER) -> str:
    """Return ``text`` when it is ``auto``, ``none`` or names a baseline that can be read; else raise ValueError."""
    if text not in ("auto", "none"):
        load(text, folder)
    return text


def choose(
    option: str, config: Mapping[str, object], environment: Mapping[str, object], folder: Path = FOLDER
) -> Choice:
    """Return what ``option`` (checked) selects for these settings and this machine."""
    if option == "none":
        return Choice(None, "no baseline: none was asked for")
    if option != "auto":
        named = load(option, folder)
        if named.expected("ratio") is None:
            return Choice(None, f"no baseline: {option} records no ratio, so it is only shown")
        different = named.differences(config, environment)
        return Choice(named, f"{option} differs in {', '.join(different)}" if different else "")
    unreadable = []
    for name in names(folder):
        try:
            candidate = load(name, folder)
        except ValueError:
            unreadable.append(name)
            continue
        if candidate.fits(config, environment):
            return Choice(candidate, "")
    broken = f" ({', '.join(unreadable)} cannot be read)" if unreadable else ""
    return Choice(None, f"no baseline fits this machine, interpreter and these settings{broken}")


def records(option: str, folder: Path = FOLDER) -> list[str]:
    """Return the records to show beside a result, in words; baselines, of this machine or another, are none."""
    found = []
    for name in names(folder) if option == "auto" else [option] if option != "none" else []:
        try:
            file = load(name, folder)
        except ValueError:
            continue  # choose() has said so
        words = file.record()
        if words is not None and file.expected("ratio") is None:
            found.append(words)
    return found
