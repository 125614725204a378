# SPDX-License-Identifier: MIT
"""The options that say how a load is put on the dispatcher, and the settings that ``tune`` leaves for ``run``.

What an option does not say, the settings of this machine say, and what those do not, the defaults here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from soak import results
from soak.baseline import MACHINE_KEYS
from soak.config import TELEMETRY, Config
from soak.options import converter, parse_path
from soak.units import format_size, parse_count, parse_duration, parse_size

FILE = "settings.json"
"""In the folder of results."""
SCHEMA = 1

MOST_THREADS = 9999
"""An identity has four digits for its producer."""
MOST_BULK = 1_000_000

DEFAULTS: Mapping[str, str] = {
    "producers": "32",
    "consumers": "1",
    "payload": TELEMETRY,
    "interval": "10ms",
    "max_batch_bytes": "320KiB",
    "max_buffered_bytes": "2MiB",
    "consumer_delay": "10us",
    "on_full": "block",
    "bulk": "1",
}
"""Each option's text when nobody says another one."""


def parse_payload(text: str) -> str | int:
    """Return ``telemetry`` or a size in bytes; raise ValueError for anything else."""
    if text == TELEMETRY:
        return text
    try:
        return parse_size(text, least=0)
    except ValueError as error:
        raise ValueError(f"{error}, or {TELEMETRY}") from None


def _parse_batch_limit(text: str) -> int | None:
    return None if text == "none" else parse_size(text)


def _parse_on_full(text: str) -> str:
    if text not in ("block", "raise"):
        raise ValueError(f"{text!r} is neither block nor raise")
    return text


def _threads(text: str) -> int:
    return parse_count(text, most=MOST_THREADS)


_OPTIONS: Mapping[str, tuple[Callable[[str], Any], str, str]] = {
    "producers": (_threads, "N", "producer threads"),
    "consumers": (_threads, "N", "consumer threads"),
    "payload": (
        parse_payload,
        f"{TELEMETRY}|SIZE",
        "a mix of web events, 163 bytes on average, or payloads of one size, 0 too",
    ),
    "interval": (parse_duration, "TIME", "the oldest event's wait"),
    "max_batch_bytes": (
        _parse_batch_limit,
        "SIZE|none",
        "at which a batch closes, none for the interval alone",
    ),
    "max_buffered_bytes": (parse_size, "SIZE", "the buffer's limit"),
    "consumer_delay": (
        partial(parse_duration, zero=True),
        "TIME",
        "what a consumer sleeps after each batch, 0 for nothing",
    ),
    "on_full": (
        _parse_on_full,
        "block|raise",
        "whether producers wait for room or drop what is refused",
    ),
    "bulk": (partial(parse_count, most=MOST_BULK), "N", "events in one call; 1: enqueue, singly"),
}


def add_settings(parser: argparse.ArgumentParser, defaults: Mapping[str, str] = DEFAULTS) -> None:
    """Add the options that ``defaults`` has a text for."""
    for name, default in defaults.items():
        parse, metavar, text = _OPTIONS[name]
        flag = "--" + name.replace("_", "-")
        parser.add_argument(
            flag, type=converter(parse), metavar=metavar, help=f"{text} ({default})", default=argparse.SUPPRESS
        )


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where results go."""
    path = converter(parse_path)
    add = parser.add_argument
    add("--out", type=path, default="soak/out", metavar="DIR", help="folder of results (%(default)s)")
    add("--json", type=path, metavar="PATH", help="the result's file (a new one in --out)")


def config_from(
    options: argparse.Namespace,
    duration: float,
    sink: str = "null",
    tuned: Mapping[str, str] | None = None,
    defaults: Mapping[str, str] = DEFAULTS,
) -> Config:
    """Return the settings for what the options say, then ``tuned``, then ``defaults``.

    A payload larger than the buffer is an error of the options: exit code 2.
    """
    texts = {**DEFAULTS, **defaults, **(tuned or {})}
    values = {
        name: getattr(options, name) if hasattr(options, name) else parse(texts[name])
        for name, (parse, _, _) in _OPTIONS.items()
    }
    config = Config(duration=duration, sink=sink, **values)
    if config.largest_payload > config.max_buffered_bytes:
        options.parser.error(
            f"argument --payload: {config.payload!r} has payloads of {format_size(config.largest_payload)}, more than"
            f" --max-buffered-bytes {config.max_buffered_bytes} ever has room for"
        )
    return config


def write(folder: Path, tuned: Mapping[str, str], place: Mapping[str, object], calibrated: bool, made: str) -> Path:
    """Write what was found out for this machine; return the file. Raises OSError."""
    content = {
        "schema": SCHEMA,
        "made": made,
        "calibrated": calibrated,
        "environment": {key: place.get(key) for key in MACHINE_KEYS},
        "settings": dict(tuned),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    results.replace(path, (json.dumps(content, indent=2) + "\n").encode())
    return path


def read(path: Path, place: Mapping[str, object]) -> tuple[dict[str, str], str]:
    """Return the tuned settings of a file, and a line that says what they are; none of them if it is another machine's.

    Raises ValueError, with a text that names the file, when it holds no settings.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, where = dict(content["settings"]), dict(content["environment"])
        for name, text in found.items():
            _OPTIONS[name][0](text)
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(path)!r} holds no settings: {type(error).__name__} {error}") from None
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{str(path)!r} holds settings of schema {content.get('schema')!r}, not {SCHEMA}")
    different = [key for key in MACHINE_KEYS if where.get(key) != place.get(key)]
    if different:
        return {}, f"settings: {path} is not used, it was made with another {', '.join(different)}"
    how = "calibrated" if content.get("calibrated") else "provisional"
    return found, f"settings: {path}, {how}, of {content.get('made')}"
