# SPDX-License-Identifier: MIT
"""The ``run`` command: sustained load with intended backpressure, and a verdict.

Its passes, all with the same settings: a calibration, a pass under tracemalloc, a census of every event, the load
itself, a calibration again. The rate over the mean of both calibrations is what compares from run to run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soak import baseline, census, environment, heap, interrupts, results, settings, verdict
from soak.calibration import calibrate
from soak.config import Config
from soak.drive import HURRY, Outcome, drive
from soak.load import Load
from soak.options import complain, converter, parse_path
from soak.payloads import PROBED_SIZE, STRIDE
from soak.progress import DISPLAYS, Stream, open_monitor, say
from soak.sinks import AVAILABLE, Place, open_sink, parse_sink, readback
from soak.units import format_seconds, format_size, parse_duration

SCHEMA = 1
"""Raised when a key of the result changes its meaning."""

EXAMPLE = """\
examples:
  python3 -m soak run
  python3 -m soak run --duration 30s --producers 8 --payload 10KiB --max-batch-bytes none --json result.json

times take ns, us, ms, s, m, h; sizes B, KiB, MiB, GiB, or none of these for bytes
Ctrl-C ends the load, drains and writes the result; a second one ends it without a result.
exit code: 0 all is well (warnings included), 1 a verdict is "fail" or a file cannot be written, 2 a bad option,
130 interrupted twice
"""


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of ``python3 -m soak``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "run",
        help="sustained load: is every event delivered once, how fast, in how much memory",
        description="Put the dispatcher under sustained load and judge correctness, throughput, memory and drain.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(main=main, parser=parser)
    add = parser.add_argument
    time_ = converter(parse_duration)
    add("--duration", type=time_, default="5m", metavar="TIME", help="how long the load lasts (%(default)s)")
    settings.add_settings(parser)
    add(
        "--settings",
        type=converter(parse_path),
        default="auto",
        metavar="auto|none|PATH",
        help="what is not said is as in this file (%(default)s: what tune left in --out)",
    )
    add("--sink", type=converter(parse_sink), default="null", metavar="SINK", help=f"{AVAILABLE}; emptied first (null)")
    settings.add_outputs(parser)
    add(
        "--display",
        choices=DISPLAYS,
        default="auto",
        help="live on a terminal, a plain line every five seconds, or none (%(default)s: live where it can be)",
    )
    add(
        "--baseline",
        type=converter(baseline.parse_baseline),
        default="auto",
        metavar="auto|NAME|none",
        help="what to compare with, of soak/baselines/ (%(default)s: what fits machine, interpreter and settings)",
    )


def main(options: argparse.Namespace) -> int:
    """Run all passes, write the result, print the summary; return the exit code."""
    place = environment.describe()
    config, note = configure(options, place)
    if note:
        say(note)
    try:
        place_of_batches = open_sink(config.sink)
    except OSError as error:
        options.parser.error(f"argument --sink: {config.sink!r} cannot be opened: {error.strerror or error}")
    except ImportError as error:
        options.parser.error(f"argument --sink: {config.sink!r} needs a package: {error}")

    files = results.Files(options.out, options.json)
    try:
        with interrupts.kept():
            result = run(config, place_of_batches, files.stream, options.baseline, place, options.display)
            unwritten = files.finish(result)
            text = results.summary(result, baseline.records(options.baseline), files.written)
            results.tell(text, unwritten)
    except KeyboardInterrupt:
        complain("interrupted again: there is no result")
        return 130
    except RuntimeError as error:
        complain(str(error))
        return 1
    overall = result["verdict"]["overall"]["status"]
    return 0 if overall != verdict.FAIL and files.well else 1


def configure(options: argparse.Namespace, place: Mapping[str, object]) -> tuple[Config, str]:
    """Return the settings: what the options say, then the file that --settings stands for; and a line about that."""
    path: Path = options.settings
    left = options.out / settings.FILE
    if str(path) == "auto":
        path = left if left.exists() else Path("none")
    tuned: dict[str, str] = {}
    note = ""
    if str(path) != "none":
        try:
            tuned, note = settings.read(path, place)
        except ValueError as error:
            options.parser.error(f"argument --settings: {error}")
    return settings.config_from(options, options.duration, options.sink, tuned), note


def run(
    config: Config,
    sink: Place | None,
    stream: Stream | None,
    baseline_option: str,
    place: dict[str, object],
    display: str = "plain",
) -> dict[str, Any]:
    """Run all passes and return the result, ready for JSON; place: of environment.describe, display: of DISPLAYS.

    A KeyboardInterrupt ends the pass that it comes in, and cuts short those after it: the result stays complete, as
    long as ``interrupts.kept()`` keeps it for the waits of the passes, and no second one comes. Raises RuntimeError
    when the machine cannot run the threads.
    """
    started = _now()
    if stream is not None:
        head = {
            "type": "header",
            "schema": SCHEMA,
            "started": started,
            "config": config.as_json(),
            "environment": place,
        }
        stream.write(head)

    before = calibrate(config, config.pass_seconds(1.0, 3.0))
    interrupted = before.interrupted or interrupts.take()
    say(f"calibration: {before.events_per_second:,.0f} events/s with no dispatcher")

    traced = heap.measure(config, HURRY if interrupted else config.pass_seconds(2.0, 4.0))
    interrupted |= traced.outcome.interrupted or interrupts.take()
    say(f"heap: peak {results.show_peak(traced.peak)}, the buffer at most {format_size(traced.peak_buffered)} full")

    counted, counting = census.take(config, HURRY if interrupted else config.pass_seconds(1.0, 4.0))
    interrupted |= counting.interrupted or interrupts.take()
    say(f"census: {counted.accepted:,} events accepted, {counted.delivered:,} delivered, each looked at")

    load = Load(config, sink)
    duration = min(HURRY, config.duration) if interrupted else config.duration
    say(f"load: {format_seconds(duration)}, {config.producers} producers, {config.consumers} consumers")
    with open_monitor(display, config, stream, duration, traced.peak) as monitor:
        outcome = drive(config, duration, load, monitor.sample, monitor.every)
    interrupted |= outcome.interrupted or interrupts.take()
    peak_rss = environment.peak_rss()

    after = calibrate(config, HURRY if interrupted else config.pass_seconds(1.0, 3.0))
    interrupted |= after.interrupted or interrupts.take()
    say(f"calibration: {after.events_per_second:,.0f} events/s again")

    figures = _figures(config, load, outcome, counted)
    problems = [
        *(f"heap pass: {problem}" for problem in traced.outcome.problems),
        *(f"census: {problem}" for problem in counted.problems),
        *figures.pop("problems"),
    ]
    found = None if sink is None else readback.of_place(sink, load.accounts, config)
    if found is not None:
        problems += found.problems
        figures["lost"] += found.lost
        figures["duplicated"] += found.repeated if sink is not None and sink.once else 0

    calibration = (before.events_per_second + after.events_per_second) / 2
    ratio = figures["delivered_per_second"] / calibration if calibration else None
    choice = baseline.choose(baseline_option, config.as_json(), place)

    def expected(key: str) -> tuple[str, float, float] | None:
        return None if choice.baseline is None else choice.baseline.expected(key)

    bound, allowance = heap.bound(config), heap.allowance(config)
    throughput = verdict.judge_throughput(
        figures["delivered_per_second"],
        ratio,
        expected("ratio"),
        choice.note,
    )
    if choice.baseline is not None and choice.note:
        throughput = verdict.Finding(throughput.status, f"{throughput.note} ({choice.note})")
    findings = {
        "correctness": verdict.judge_correctness(
            problems=problems,
            lost=figures["lost"],
            duplicated=figures["duplicated"],
            rejected=figures["rejected"],
            on_full=config.on_full,
            remarks=_remarks(config, counted),
        ),
        "throughput": throughput,
        "memory": verdict.judge_memory(traced.peak, bound, allowance, expected("peak_heap_bytes")),
        "drain": verdict.judge_drain(figures["drain_seconds"], expected("drain_seconds")),
    }
    findings["overall"] = verdict.overall(findings)
    return {
        "schema": SCHEMA,
        "started": started,
        "finished": _now(),
        "interrupted": interrupted,
        "verdict": {name: finding.as_json() for name, finding in findings.items()},
        **figures,
        "calibration": calibration,
        "ratio": ratio,
        "peak_heap_bytes": traced.peak,
        "peak_rss_bytes": peak_rss,
        "heap": {
            "bound_bytes": bound,
            "allowance_bytes": allowance,
            "peak_buffered_bytes": traced.peak_buffered,
            "seconds": traced.outcome.load_seconds,
        },
        "census": vars(counted),
        "sink": None if found is None else vars(found),
        "calibrations": {
            "before": before.events_per_second,
            "after": after.events_per_second,
            "used": "mean",
        },
        "baseline": None if choice.baseline is None else choice.baseline.name,
        "problems": problems,
        "config": config.as_json(),
        "environment": place,
        "samples": None if stream is None else stream.path.name,
    }


def _figures(config: Config, load: Load, outcome: Outcome, counted: census.CensusResult) -> dict[str, Any]:
    """Return the load's figures, and under ``problems`` what does not add up."""
    accepted, refused = sum(load.accepted), sum(load.refused)
    delivered = sum(taken.events for taken in load.taken)
    nbytes = sum(taken.nbytes for taken in load.taken)
    problems = list(outcome.problems)
    stats = outcome.stats
    if stats is not None:
        if outcome.problems:
            # A producer that raised has left its count a round behind, so the dispatcher's is the better one.
            accepted = stats.accepted
        own = (accepted, delivered)
        if own != (stats.accepted, stats.delivered):
            problems.append(
                f"producers and consumers count {own[0]} accepted, {own[1]} delivered;"
                f" stats() says {stats.accepted}, {stats.delivered}"
            )
        # How enqueue_many counts what it did not take is its own affair; producers that wait are never refused.
        comparable = config.bulk == 1 or config.on_full == "block"
        if comparable and not outcome.problems and refused != stats.rejected:
            problems.append(f"producers count {refused} refused, stats() says {stats.rejected}")
        if not stats.accepted_bytes == stats.delivered_bytes == (nbytes if config.payload != 0 else delivered):
            problems.append(
                f"stats() says {stats.accepted_bytes} bytes accepted, {stats.delivered_bytes} delivered;"
                f" the batches held {nbytes}"
            )
    if config.payload_size is not None and nbytes != config.payload_size * delivered:
        problems.append(f"{delivered} payloads of {config.payload_size} bytes cannot make the {nbytes} delivered")

    probes = sum(taken.probes for taken in load.taken)
    missing = sum(sent.probes for sent in load.sent) - probes
    disordered = sum(taken.out_of_order for taken in load.taken)
    if not outcome.problems:
        if missing:
            problems.append(f"{abs(missing)} probes {'lost' if missing > 0 else 'too many'}")
        if sum(sent.checksum for sent in load.sent) != sum(taken.checksum for taken in load.taken):
            problems.append("the checksums of the probes sent and received differ")
    if disordered:
        problems.append(f"{disordered} probes came out of order")

    seconds = outcome.load_seconds + (outcome.drain_seconds or 0.0)
    mean = sum(load.accepted) / config.producers
    return {
        "delivered_per_second": delivered / seconds if seconds else 0.0,
        "accepted": accepted,
        "rejected": refused,
        "delivered": delivered,
        "delivered_bytes": nbytes,
        # The probes are a part of the load's events: what counts show already is not added a second time.
        "lost": max(0, accepted - delivered, 0 if outcome.problems else missing) + counted.lost,
        "duplicated": max(0, delivered - accepted, 0 if outcome.problems else -missing)
        + counted.duplicated
        + counted.repeated,
        "batches": sum(taken.batches for taken in load.taken),
        "load_seconds": outcome.load_seconds,
        "drain_seconds": outcome.drain_seconds,
        "shutdown_seconds": outcome.shutdown_seconds,
        "latency_seconds": load.latencies().as_json(),
        "slowest_producer_share": min(load.accepted) / mean if mean else None,
        "stats": None if stats is None else stats._asdict(),
        "problems": problems,
    }


def _remarks(config: Config, counted: census.CensusResult) -> list[str]:
    """Return what the settings kept from being checked."""
    remarks = []
    if not counted.identities_checked:
        remarks.append("payloads too small to carry an identity: counted and checksummed, order not checked")
    elif config.consumers > 1:
        remarks.append("order checked at each consumer")
    if config.payload_size is not None and config.payload_size < PROBED_SIZE:
        remarks.append(f"no latency below {PROBED_SIZE} bytes")
    elif config.payload_size is None or config.payload_size >= PROBED_SIZE:
        remarks.append(f"latency of one event in {STRIDE}")
    return remarks


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
