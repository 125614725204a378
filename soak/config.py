# SPDX-License-Identifier: MIT
"""The settings of a load: what all passes of one run share, the options for them, and the file that ``tune`` leaves."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from soak import cli, payloads

TELEMETRY = "telemetry"
FILE = "settings.json"  # in the folder of results
SCHEMA = 1
MACHINE_KEYS = ("machine", "cores", "interpreter")
"""What of an environment must be equal for settings and baselines to apply."""


def payload(text: str) -> str | int:
    return text if text == TELEMETRY else cli.size(text, least=0)


def on_full(text: str) -> str:
    if text not in ("block", "raise"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither block nor raise")
    return text


def option(default: str, parse: Callable[[str], Any], metavar: str, text: str) -> Any:
    """Return a field of a Config that has an option; the default is what a user would give."""
    return field(default=parse(default), metadata={"option": (default, parse, metavar, text)})


threads = cli.count(9999)  # an identity has four digits for its producer


@dataclass(frozen=True)
class Config:
    """One run's settings, checked. Times in seconds, sizes in bytes."""

    duration: float  # of the load itself; the other passes derive their length from it
    sink: str
    producers: int = option("32", threads, "N", "producer threads")
    consumers: int = option("1", threads, "N", "consumer threads")
    payload: str | int = option(TELEMETRY, payload, f"{TELEMETRY}|SIZE", "web events of 163 bytes, or of one size")
    interval: float = option("10ms", cli.duration, "TIME", "how long an event waits for its batch at most")
    max_batch_bytes: int | None = option("320KiB", cli.size_or_none, "SIZE|none", "at which a batch closes")
    max_buffered_bytes: int = option("2MiB", cli.size, "SIZE", "the buffer's limit")
    consumer_delay: float = option("10us", cli.duration_or_zero, "TIME", "how long a consumer sleeps after each batch")
    on_full: str = option("block", on_full, "block|raise", "whether producers wait for room or drop what is refused")
    bulk: int = option("1", cli.count(1_000_000), "N", "events in one call; 1: enqueue, more: enqueue_many")

    @property
    def payload_size(self) -> int | None:
        """The size of every payload, or None for the telemetry mix."""
        return self.payload if isinstance(self.payload, int) else None

    @property
    def largest_payload(self) -> int:
        return payloads.LARGEST if self.payload_size is None else self.payload_size

    @property
    def mean_payload(self) -> int:
        return payloads.MEAN if self.payload_size is None else self.payload_size

    @property
    def largest_batch(self) -> int:
        """The most bytes that one batch can have: a payload above the batch limit goes alone."""
        limit = self.max_buffered_bytes if self.max_batch_bytes is None else self.max_batch_bytes
        return min(max(limit, self.largest_payload), self.max_buffered_bytes)

    @property
    def longest_drain(self) -> float:
        """The seconds, a day at most, that consumers may rest until all that is held now is delivered."""
        held = self.max_buffered_bytes + self.producers * self.bulk * self.largest_payload
        return min(3 * self.interval + self.consumer_delay * (held // self.largest_batch + 2), 24 * 3600.0)

    def pass_seconds(self, least: float, most: float) -> float:
        """Return how long a pass other than the load lasts: a tenth of the load, within these limits."""
        return min(max(self.duration / 10, least), most)


OPTIONS: Mapping[str, tuple[str, Callable[[str], Any], str, str]] = {
    one.name: one.metadata["option"] for one in fields(Config) if one.metadata
}
"""By name: default, type, metavar and help."""


def parsed(name: str, text: str) -> Any:
    """Return the value of a setting that a text stands for. Raises KeyError, ArgumentTypeError."""
    return OPTIONS[name][1](text)


def add_settings(add: Callable[..., object], *names: str, **usual: str) -> None:
    """Add the options of these names, or all; usual: defaults other than those of OPTIONS."""
    for name in names or OPTIONS:
        default, parse, metavar, text = OPTIONS[name]
        flag, shown = "--" + name.replace("_", "-"), f"{text} ({usual.get(name, default)})"
        add(flag, type=parse, metavar=metavar, help=shown, default=argparse.SUPPRESS)


def add_outputs(add: Callable[..., object]) -> None:
    """Add the options that say where results go."""
    add("--out", type=cli.path, default="soak/out", metavar="DIR", help="folder of results (%(default)s)")
    add("--json", type=cli.path, metavar="PATH", help="the result's file (a new one in --out)")


def config_from(options: argparse.Namespace, duration: float, sink: str = "null", **usual: str) -> Config:
    """Return what the options say, then ``usual``, then the defaults; a payload above the buffer is a bad option."""
    values = {name: parsed(name, text) for name, text in usual.items()}
    values |= {name: value for name, value in vars(options).items() if name in OPTIONS}
    config = Config(duration=duration, sink=sink, **values)
    if config.largest_payload > config.max_buffered_bytes:
        options.parser.error(
            f"argument --payload: {config.payload!r} has payloads of {cli.format_size(config.largest_payload)}, which"
            f" never fit into --max-buffered-bytes {config.max_buffered_bytes}"
        )
    return config


def as_file(config: Config, place: Mapping[str, object], calibrated: bool, made: str) -> bytes:
    """Return the file that says what was found out for this machine; the settings are as options would give them."""
    names = ("payload", "producers", "interval", "consumer_delay", "max_batch_bytes", "max_buffered_bytes")
    values = {name: getattr(config, name) for name in names}
    times = {name: f"{round(value * 1e9)}ns" for name, value in values.items() if isinstance(value, float)}
    texts = {**{name: str(value).lower() for name, value in values.items()}, **times}
    machine = {key: place.get(key) for key in MACHINE_KEYS}
    content = {"schema": SCHEMA, "made": made, "calibrated": calibrated, "environment": machine, "settings": texts}
    return (json.dumps(content, indent=2) + "\n").encode()


def read_file(path: Path, place: Mapping[str, object]) -> tuple[dict[str, str], str]:
    """Return the settings in a file and a line about them; no settings when they are for another machine.

    Raises ValueError, with a text that names the file, when it holds no settings.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, where = dict(content["settings"]), dict(content["environment"])
        for name, text in found.items():
            parsed(name, text)
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}, not {SCHEMA}")
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{str(path)!r} holds no settings: {type(error).__name__} {error}") from None
    different = [key for key in MACHINE_KEYS if where.get(key) != place.get(key)]
    if different:
        return {}, f"settings: {path} is not used: another {', '.join(different)}"
    how = "calibrated" if content.get("calibrated") else "provisional"
    return found, f"settings: {path}, {how}, of {content.get('made')}"
