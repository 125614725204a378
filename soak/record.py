# SPDX-License-Identifier: MIT
"""The ``baseline`` command: record what this machine reaches, so that a later run can be compared with it."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soak import baseline, environment, interrupts, results, run, settings, verdict
from soak.config import Config
from soak.options import complain, converter, parse_path
from soak.progress import say
from soak.units import format_seconds, format_size, parse_count, parse_duration

MOST_RUNS = 1000
TOLERANCE = 1.5
"""A later run may differ from the median by so many times the range of the recorded ones."""
LEAST_RATIO = 0.05
"""And by so much of the median at least: a few runs in a row do not show what a machine does over a day."""
LEAST_HEAP = 64 * 1024
LEAST_DRAIN = 0.05
"""Bytes and seconds, likewise."""

EXAMPLE = """\
examples:
  python3 -m soak baseline
  python3 -m soak baseline --runs 9 --duration 30s --producers 8 --name my-board

exit code: 0 recorded, 1 a run failed or the file cannot be written, 2 a bad option, 130 interrupted
"""


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of ``python3 -m soak``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "baseline",
        help="record this machine's figures, for run to compare with",
        description="Run the soak several times, and record the medians and how far they differ.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(main=main, parser=parser)
    add = parser.add_argument
    runs = converter(lambda text: parse_count(text, most=MOST_RUNS))
    add("--runs", type=runs, default="5", metavar="N", help="how many (%(default)s)")
    add(
        "--duration",
        type=converter(parse_duration),
        default="10s",
        metavar="TIME",
        help="how long each load lasts (%(default)s)",
    )
    settings.add_settings(parser)
    add("--name", type=converter(_parse_name), metavar="NAME", help="of the file (machine, interpreter and settings)")
    add(
        "--out",
        type=converter(parse_path),
        default=baseline.FOLDER,
        metavar="DIR",
        help="folder of the file (soak/baselines)",
    )


def _parse_name(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+", text) or text in ("auto", "none"):
        raise ValueError(f"{text!r} is no name: letters, digits, '.', '_' and '-', and neither auto nor none")
    return text


def main(options: argparse.Namespace) -> int:
    """Run, record, tell; return the exit code."""
    place = environment.describe()
    config = settings.config_from(options, options.duration)
    found = []
    try:
        with interrupts.kept():
            for number in range(1, options.runs + 1):
                say(f"run {number} of {options.runs}")
                result = run.run(config, None, None, "none", place, "none")
                if result["interrupted"] or interrupts.take():
                    raise KeyboardInterrupt
                overall = result["verdict"]["overall"]
                if overall["status"] == verdict.FAIL:
                    complain(f"run {number}: {overall['note']}: not recorded")
                    return 1
                found.append(result)
    except KeyboardInterrupt:
        complain("interrupted: nothing is recorded")
        return 130
    except RuntimeError as error:
        complain(f"{error}: nothing is recorded")
        return 1
    content = summarize(found, place)
    path = options.out / f"{options.name or default_name(config, place)}.json"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        results.replace(path, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        complain(f"cannot write {str(path)!r}: {error.strerror or error}; the baseline goes to stdout")
        print(json.dumps(content, indent=2), flush=True)
        return 1
    print("\n".join(show(content, path)), flush=True)
    return 0


def summarize(found: Sequence[Mapping[str, Any]], place: Mapping[str, object]) -> dict[str, Any]:
    """Return what is recorded of some results: medians, and how far from them a run may be.

    >>> runs = [{"ratio": r, "peak_heap_bytes": None, "drain_seconds": 0.001, "delivered_per_second": 1e5,
    ...     "calibration": 2e5, "config": {"duration": 1.0}} for r in (0.48, 0.5, 0.56)]
    >>> content = summarize(runs, {"machine": "a board", "commit": "abc"})
    >>> content["ratio"], round(content["ratio_spread"], 3), "peak_heap_bytes" in content
    (0.5, 0.12, False)
    """
    content: dict[str, Any] = {
        "what": "tempo.py, `python3 -m soak run`",
        "recorded": time.strftime("%Y-%m-%d"),
        "machine": place.get("machine"),
        "commit": place.get("commit"),
    }
    least: dict[str, float] = {
        "ratio": LEAST_RATIO * statistics.median(result["ratio"] for result in found),
        "peak_heap_bytes": LEAST_HEAP,
        "drain_seconds": LEAST_DRAIN,
    }
    for key in baseline.COMPARED:
        values = [result[key] for result in found if result[key] is not None]
        if values:
            content[key] = statistics.median(values)
            content[f"{key}_spread"] = max(TOLERANCE * (max(values) - min(values)), least[key])
    content["runs"] = [
        {key: result[key] for key in ("delivered_per_second", "calibration", *baseline.COMPARED)} for result in found
    ]
    # Files of this kind are passed on: where somebody's interpreter lies is nobody else's business.
    content["environment"] = {key: value for key, value in place.items() if key != "executable"}
    content["config"] = dict(found[0]["config"])
    return content


def default_name(config: Config, place: Mapping[str, object]) -> str:
    """Return a file's name that says machine and interpreter, and tells settings other than the defaults apart."""
    words = f"{place['machine']} {place['cores']}core {place['interpreter']}"
    name = re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")
    ours = {key: value for key, value in config.as_json().items() if key in baseline.SETTING_KEYS}
    usual = settings.config_from(argparse.Namespace(), config.duration).as_json()
    if any(usual[key] != value for key, value in ours.items()):
        name += "-" + hashlib.sha256(json.dumps(ours, sort_keys=True).encode()).hexdigest()[:6]
    return name


def show(content: Mapping[str, Any], path: Path) -> list[str]:
    """Return what was recorded, for people."""
    lines = [f"RECORDED: {path}, medians of {len(content['runs'])} runs"]
    shown = {"ratio": ("of the calibration", "{:.3f}".format), "peak_heap_bytes": ("peak heap", format_size)}
    for key in baseline.COMPARED:
        if key in content:
            name, text = shown.get(key, ("drain", format_seconds))
            lines.append(f"  {name}: {text(content[key])} +- {text(content[key + '_spread'])}")
    return lines
