# SPDX-License-Identifier: MIT
"""Recorded figures under ``soak/baselines/``: which of them a run may be compared with, and the ``baseline`` command.

A file has ``ratio`` (events/s over the calibration of the same run), ``ratio_spread`` (how far another run may be from
that), and likewise the peak heap and the drain.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from soak import cli, environment, interrupts, results, verdict
from soak import config as settings
from soak.cli import say
from soak.config import MACHINE_KEYS, Config

FOLDER = Path(__file__).resolve().parent / "baselines"
TOLERANCE = 1.5  # a later run may differ from the median by so many times the range of the recorded ones
LEAST = {"ratio": 0.05, "peak_heap_bytes": 64 * 1024, "drain_seconds": 0.05}
"""What is compared, and how much a run may differ at least (the ratio: a share of it): a few do not show what a day
brings."""

EXAMPLE = """\
examples:
  python3 -m soak baseline
  python3 -m soak baseline --runs 9 --duration 30s --producers 8 --name my-board
"""


@dataclass(frozen=True)
class Baseline:
    """One recorded file."""

    name: str
    content: Mapping[str, Any]

    def expected(self, key: str) -> verdict.Known:
        """Return the name, the figure of this key and its spread; None when it is not recorded."""
        if f"{key}_spread" not in self.content:
            return None
        return self.name, float(self.content[key]), float(self.content[f"{key}_spread"])

    def differences(self, config: Mapping[str, object], environment: Mapping[str, object]) -> list[str]:
        """Return in which keys it is of another machine, interpreter or settings (the duration does not count)."""
        parts = (("environment", environment, MACHINE_KEYS), ("config", config, (*settings.OPTIONS, "sink")))
        return [key for part, ours, keys in parts for key in keys if self.content[part].get(key) != ours.get(key)]


def load(name: str, folder: Path = FOLDER) -> Baseline:
    """Read one baseline. Raises ArgumentTypeError when there is no such file or it is none."""
    known = sorted(path.stem for path in folder.glob("*.json"))
    if name not in known:
        raise argparse.ArgumentTypeError(f"{name!r} is not a baseline (there are: auto, none, {', '.join(known)})")
    try:
        one = Baseline(name, json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
        one.differences({}, {})
        float(one.content["ratio_spread"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} holds no baseline: {type(error).__name__} {error}") from None
    return one


def name_of(text: str) -> str:
    """Return ``text`` when it is ``auto``, ``none`` or names a baseline that can be read."""
    return text if text in ("auto", "none") else load(text).name


def choose(
    option: str, config: Mapping[str, object], environment: Mapping[str, object], folder: Path = FOLDER
) -> tuple[Baseline | None, str]:
    """Return the baseline that ``option`` (checked) selects, and what there is to say about it or about having none."""
    if option == "none":
        return None, "no baseline: none was asked for"
    for name in sorted(path.stem for path in folder.glob("*.json")) if option == "auto" else [option]:
        try:
            one = load(name, folder)
        except argparse.ArgumentTypeError as error:
            say(f"baseline: {error}")
            continue
        different = one.differences(config, environment)
        if option == name or not different:
            return one, f"{name} differs in {', '.join(different)}" if different else ""
    return None, "no baseline fits this machine, interpreter and these settings"


# The command.


def new_name(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+", text) or text in ("auto", "none"):
        raise argparse.ArgumentTypeError(f"{text!r} is no name: letters, digits, '.', '_', '-'; not auto, not none")
    return text


def add_parser(commands: Any) -> None:
    purpose = "Run the soak several times; record the medians and how far the runs differ."
    add = cli.add_command(commands, "baseline", main, purpose, EXAMPLE)
    add("--runs", type=cli.count(1000), default="5", metavar="N", help="how many (%(default)s)")
    add("--duration", type=cli.duration, default="10s", metavar="TIME", help="of each load (%(default)s)")
    settings.add_settings(add)
    add("--name", type=new_name, metavar="NAME", help="of the file (machine, interpreter and settings)")
    add("--out", type=cli.path, default=FOLDER, metavar="DIR", help="folder of the file (soak/baselines)")


def main(options: argparse.Namespace) -> int:
    from soak import run  # noqa: PLC0415 - it compares with what this module has read

    place = environment.describe()
    config = settings.config_from(options, options.duration)
    found: list[dict[str, Any]] = []
    with interrupts.kept():
        while len(found) < options.runs:
            say(f"run {len(found) + 1} of {options.runs}")
            result = run.run(config, None, None, "none", place, "none")
            if interrupts.seen():
                raise KeyboardInterrupt
            if result["verdict"]["overall"]["status"] == verdict.FAIL:
                raise cli.Failure(f"nothing is recorded: {result['verdict']['overall']['note']}")
            found.append(result)
    content = summarize(found, place)
    path = options.out / f"{options.name or default_name(config, place)}.json"
    text = json.dumps(content, indent=2) + "\n"
    if not results.write(path, text.encode(), "; the baseline goes to stdout"):
        print(text, end="", flush=True)
        return 1
    print(f"RECORDED: {path}, medians of {len(found)} runs")
    for key in (key for key in LEAST if key in content):
        print(f"  {key}: {content[key]:.6g} +- {content[key + '_spread']:.3g}")
    return 0


def summarize(found: Sequence[Mapping[str, Any]], place: Mapping[str, object]) -> dict[str, Any]:
    """Return what is recorded of some results: medians, and how far from them a run may be."""
    content: dict[str, Any] = {
        "what": "tempo.py, `python3 -m soak run`",
        "recorded": time.strftime("%Y-%m-%d"),
        "machine": place.get("machine"),
        "commit": place.get("commit"),
    }
    for key, least in LEAST.items():
        values = [result[key] for result in found if result[key] is not None]
        if values:
            content[key] = statistics.median(values)
            at_least = least * content[key] if key == "ratio" else least
            content[f"{key}_spread"] = max(TOLERANCE * (max(values) - min(values)), at_least)
    content["runs"] = [{key: one[key] for key in ("delivered_per_second", "calibration", *LEAST)} for one in found]
    return {**content, "environment": dict(place), "config": dict(found[0]["config"])}


def default_name(config: Config, place: Mapping[str, object]) -> str:
    """Return a file's name that says machine and interpreter, and tells settings other than the defaults apart."""
    words = f"{place['machine']} {place['cores']}core {place['interpreter']}"
    name = re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")
    if config == settings.config_from(argparse.Namespace(), config.duration):
        return name
    return f"{name}-{hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:6]}"
