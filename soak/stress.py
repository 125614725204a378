# SPDX-License-Identifier: MIT
"""The ``stress`` command: many producers at once, each with a fixed number of payloads, and every one accounted for."""

from __future__ import annotations

import argparse
import time
from typing import Any

from soak import census, environment, interrupts, results, settings, verdict
from soak.census import CensusResult
from soak.config import Config
from soak.drive import Outcome
from soak.options import complain, converter
from soak.progress import say
from soak.units import format_seconds, parse_count, parse_duration

DEFAULTS = {**settings.DEFAULTS, "producers": "256"}
EACH = "2000"
MOST_EACH = 100_000_000
LOOK = 0.02
"""Seconds between two looks at whether all is sent."""

EXAMPLE = """\
examples:
  python3 -m soak stress
  python3 -m soak stress --producers 1000 --each 500 --payload 10KiB --max-buffered-bytes 1MiB

Ctrl-C ends the sending, drains and writes the result; a second one ends it without a result.
exit code: 0 every payload sent was delivered once and in order, 1 not so or a file cannot be written, 2 a bad option,
130 interrupted twice
"""


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of ``python3 -m soak``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "stress",
        help="256 producers, 2,000 payloads each: are all of them delivered",
        description="Let many producers send a fixed number of payloads each, and account for every single one.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(main=main, parser=parser)
    add = parser.add_argument
    each = converter(lambda text: parse_count(text, most=MOST_EACH))
    add("--each", type=each, default=EACH, metavar="N", help="payloads that a producer sends (%(default)s)")
    settings.add_settings(parser, DEFAULTS)
    add(
        "--limit",
        type=converter(parse_duration),
        default="10m",
        metavar="TIME",
        help="when all must be sent (%(default)s)",
    )
    settings.add_outputs(parser)


def main(options: argparse.Namespace) -> int:
    """Run it, and conclude; return the exit code."""
    config = settings.config_from(options, options.limit, defaults=DEFAULTS)
    files = results.Files(options.out, options.json, "stress")
    try:
        with interrupts.kept():  # from before the first word, or an interrupt in between would count as the second
            say(f"stress: {config.producers} producers, {options.each:,} payloads each")
            counted, outcome = census.take(config, options.limit, options.each, LOOK)
            outcome.interrupted |= interrupts.take()
            return _conclude(options, config, counted, outcome, files)
    except KeyboardInterrupt:
        complain("interrupted again: there is no result")
        return 130


def _conclude(
    options: argparse.Namespace, config: Config, counted: CensusResult, outcome: Outcome, files: results.Files
) -> int:
    """Judge, write the result, print the summary; return the exit code."""
    wanted = config.producers * options.each
    finding = judge(config, counted, outcome, wanted)
    rate = counted.delivered / (outcome.load_seconds + (outcome.drain_seconds or 0.0))
    place = environment.describe()
    result = {
        "schema": 1,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "verdict": {"overall": finding.as_json()},
        "wanted": wanted,
        "each": options.each,
        "interrupted": outcome.interrupted,
        "delivered_per_second": rate,
        "drain_seconds": outcome.drain_seconds,
        "shutdown_seconds": outcome.shutdown_seconds,
        "peak_rss_bytes": environment.peak_rss(),
        "lost": counted.lost,
        "duplicated": counted.duplicated + counted.repeated,
        **{name: value for name, value in vars(counted).items() if name != "problems"},
        "problems": counted.problems,
        "stats": None if outcome.stats is None else outcome.stats._asdict(),
        "config": config.as_json(),
        "environment": place,
    }
    unwritten = files.finish(result)
    text = "\n".join(
        [
            f"{finding.status.upper()}: {finding.note}",
            f"events        {counted.accepted:,} accepted, {counted.delivered:,} delivered, {counted.refused:,} refused"
            f" of {wanted:,}, each looked at",
            f"rate          {rate:,.0f} events/s in {format_seconds(outcome.load_seconds)};"
            f" drained in {format_seconds(outcome.drain_seconds)}",
            f"on            {place['machine']}, {place['cores']} cores, {place['interpreter']}",
            f"written       {', '.join(map(str, files.written)) or 'nothing'}",
        ]
    )
    results.tell(text, unwritten)
    return 0 if finding.status != verdict.FAIL and files.well else 1


def judge(config: Config, counted: CensusResult, outcome: Outcome, wanted: int) -> verdict.Finding:
    """Return the verdict; what was not sent because of an interrupt is a warning."""
    finding = verdict.judge_correctness(
        problems=counted.problems,
        lost=counted.lost,
        duplicated=counted.duplicated + counted.repeated,
        rejected=counted.refused,
        on_full=config.on_full,
        remarks=[] if counted.identities_checked else ["payloads too small to carry an identity: order not checked"],
    )
    sent = counted.accepted + counted.refused
    if finding.status == verdict.PASS and sent != wanted:
        why = "interrupted" if outcome.interrupted else f"not done within {format_seconds(config.duration)}"
        status = verdict.WARN if outcome.interrupted else verdict.FAIL
        return verdict.Finding(status, f"{why}: {sent:,} of {wanted:,} payloads sent; {finding.note}")
    return finding
