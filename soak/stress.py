# SPDX-License-Identifier: MIT
"""The ``stress`` command: many producers at once, each with a fixed number of payloads, every one accounted for."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from soak import census, cli, environment, interrupts, results, verdict
from soak import config as settings
from soak.cli import format_seconds, say
from soak.config import Config

PRODUCERS = "256"
LOOK = 0.02  # seconds between two looks at whether all is sent

EXAMPLE = """\
examples:
  python3 -m soak stress
  python3 -m soak stress --producers 1000 --each 500 --payload 10KiB --max-buffered-bytes 1MiB

Ctrl-C ends the sending, drains and writes the result; a second one ends it without a result.
"""


def add_parser(commands: Any) -> None:
    purpose = "Let many producers send a fixed number of payloads each, and account for every one."
    add = cli.add_command(commands, "stress", main, purpose, EXAMPLE)
    each = cli.count(100_000_000)
    add("--each", type=each, default="2000", metavar="N", help="payloads that a producer sends (%(default)s)")
    settings.add_settings(add, producers=PRODUCERS)
    add("--limit", type=cli.duration, default="10m", metavar="TIME", help="when all must be sent (%(default)s)")
    settings.add_outputs(add)


def main(options: argparse.Namespace) -> int:
    config = settings.config_from(options, options.limit, producers=PRODUCERS)
    files = results.Files(options.out, options.json, "stress")
    with interrupts.kept():  # before the first word: an interrupt after that must count as the first
        say(f"stress: {config.producers} producers, {options.each:,} payloads each")
        counted, outcome = census.take(config, options.limit, options.each, LOOK)
        wanted, place = config.producers * options.each, environment.describe()
        finding = judge(config, counted, wanted)
        rate = counted.delivered / outcome.seconds
        result = {
            "schema": 1,
            "finished": results.now(),
            "verdict": {"overall": finding._asdict()},
            "wanted": wanted,
            "interrupted": interrupts.seen(),
            "delivered_per_second": rate,
            "peak_rss_bytes": environment.peak_rss(),
            "lost": counted.lost,
            "duplicated": counted.duplicated,
            **outcome.as_json(),
            **vars(counted),
            "config": asdict(config),
            "environment": place,
        }
        lines = [
            f"{finding.status.upper()}: {finding.note}",
            f"events        {counted.accepted:,} accepted, {counted.delivered:,} delivered,"
            f" {counted.refused:,} refused of {wanted:,}, each checked",
            f"rate          {rate:,.0f} events/s in {format_seconds(outcome.load_seconds)};"
            f" drained in {format_seconds(outcome.drain_seconds)}",
            f"on            {environment.line(place)}",
        ]
        files.finish(result, lines)
    return 0 if finding.status != verdict.FAIL and files.well else 1


def judge(config: Config, counted: census.CensusResult, wanted: int) -> verdict.Finding:
    """Return the verdict; what was not sent because of an interrupt is a warning."""
    found = {name: getattr(counted, name) for name in ("problems", "lost", "duplicated", "remarks")}
    finding = verdict.judge_correctness(**found, rejected=counted.refused, on_full=config.on_full)
    sent = counted.accepted + counted.refused
    if finding.status != verdict.PASS or sent == wanted:
        return finding
    late = f"not done within {format_seconds(config.duration)}"
    status, why = (verdict.WARN, "interrupted") if interrupts.seen() else (verdict.FAIL, late)
    return verdict.Finding(status, f"{why}: {sent:,} of {wanted:,} payloads sent; {finding.note}")
