# SPDX-License-Identifier: MIT
"""The ``run`` command: sustained load with intended backpressure, and a verdict.

Its passes, all with the same settings: a calibration, a pass under tracemalloc, a census of every event, the load
itself, a calibration again. The rate over the mean of both calibrations is what compares from run to run.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from soak import baseline, census, cli, environment, heap, interrupts, results, verdict
from soak import config as settings
from soak.calibration import calibrate
from soak.cli import format_seconds, format_size, say
from soak.config import Config
from soak.display import DISPLAYS, Monitor, Stream
from soak.drive import Outcome, drive
from soak.load import Latencies, Load
from soak.sinks import places, readback

SCHEMA = 1  # raised when a key of the result changes its meaning

EXAMPLE = """\
examples:
  python3 -m soak run
  python3 -m soak run --duration 30s --producers 8 --payload 10KiB --max-batch-bytes none --json result.json

times take ns, us, ms, s, m, h; sizes B, KiB, MiB, GiB, or none of these for bytes
Ctrl-C ends the load, drains and writes the result; a second one ends it without a result.
"""


def add_parser(commands: Any) -> None:
    purpose = "Put the dispatcher under sustained load and judge correctness, throughput, memory and drain."
    add = cli.add_command(commands, "run", main, purpose, EXAMPLE)
    add("--duration", type=cli.duration, default="5m", metavar="TIME", help="how long the load lasts (%(default)s)")
    settings.add_settings(add)
    known = "auto: what tune left in --out"
    add("--settings", type=cli.path, default="auto", metavar="auto|none|PATH", help=f"for what is not said ({known})")
    add("--sink", type=places.parse, default="null", metavar="SINK", help=f"{places.AVAILABLE}; emptied first (null)")
    settings.add_outputs(add)
    add("--display", choices=DISPLAYS, default="auto", help="while it lasts (auto: live on a terminal, with rich)")
    known = "to compare with (auto: what fits machine, interpreter and settings)"
    add("--baseline", type=baseline.name_of, default="auto", metavar="auto|NAME|none", help=known)


def main(options: argparse.Namespace) -> int:
    place = environment.describe()
    config = configure(options, place)
    try:
        sink = places.open_sink(config.sink)
    except OSError as error:
        options.parser.error(f"argument --sink: {config.sink!r} cannot be opened: {error.strerror or error}")
    except ImportError as error:
        options.parser.error(f"argument --sink: {config.sink!r} needs a package: {error}")

    files = results.Files(options.out, options.json)
    with interrupts.kept():
        result = run(config, sink, files.stream, options.baseline, place, options.display)
        files.finish(result, summary(result))
    return 0 if result["verdict"]["overall"]["status"] != verdict.FAIL and files.well else 1


def configure(options: argparse.Namespace, place: Mapping[str, object]) -> Config:
    """Return the settings: what the options say, then the file that --settings stands for, which is told."""
    tuned: dict[str, str] = {}
    auto = options.settings == Path("auto")
    path: Path = options.out / settings.FILE if auto else options.settings
    if path.exists() if auto else path != Path("none"):
        try:
            tuned, note = settings.read_file(path, place)
        except ValueError as error:
            options.parser.error(f"argument --settings: {error}")
        say(note)
    return settings.config_from(options, options.duration, options.sink, **tuned)


def run(
    config: Config,
    sink: places.Place | None,
    stream: Stream | None,
    baseline_option: str,
    place: dict[str, object],
    display: str = "plain",
) -> dict[str, Any]:
    """Run all passes and return the result, ready for JSON; place: of environment.describe, display: of DISPLAYS.

    A first interrupt ends the pass that it comes in, and cuts those after it short. Raises Failure when the machine
    cannot run the threads.
    """
    started = results.now()
    if stream is not None:
        head = {"type": "header", "schema": SCHEMA, "started": started}
        stream.write({**head, "config": asdict(config), "environment": place})

    before = calibrate(config, config.pass_seconds(1.0, 3.0))
    say(f"calibration: {before:,.0f} events/s with no dispatcher")
    peak_heap, traced = heap.measure(config, config.pass_seconds(2.0, 4.0))
    fullest = traced.stats.peak_buffered_bytes if traced.stats else 0
    say(f"heap: peak {format_size(peak_heap)}, the buffer at most {format_size(fullest)} full")
    counted, _ = census.take(config, config.pass_seconds(1.0, 4.0))
    say(f"census: {counted.accepted:,} events accepted, {counted.delivered:,} delivered, each checked")
    load = Load(config, sink)
    say(f"load: {format_seconds(config.duration)}, {config.producers} producers, {config.consumers} consumers")
    with Monitor(display, config, stream, config.duration, peak_heap) as monitor:
        outcome = drive(config, config.duration, load, monitor.sample, monitor.every)
    peak_rss = environment.peak_rss()
    after = calibrate(config, config.pass_seconds(1.0, 3.0))
    say(f"calibration: {after:,.0f} events/s again")

    figures, wrong = _figures(config, load, outcome, counted)
    problems = [f"heap pass: {problem}" for problem in traced.problems]
    problems += [f"census: {problem}" for problem in counted.problems] + wrong
    found = None if sink is None else readback.read_back(sink, load.accounts, config)
    if sink is not None and found is not None:
        problems += found.problems
        figures["lost"] += found.lost
        figures["duplicated"] += found.repeated if sink.once else 0

    calibration = (before + after) / 2
    ratio = figures["delivered_per_second"] / calibration if calibration else None
    compared, note = baseline.choose(baseline_option, asdict(config), place)
    bound, allowance = heap.bound(config), heap.allowance(config)
    known = {key: compared.expected(key) if compared else None for key in baseline.LEAST}
    late = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    findings = {
        "correctness": verdict.judge_correctness(
            problems=problems,
            **{key: figures[key] for key in ("lost", "duplicated", "rejected")},
            on_full=config.on_full,
            remarks=counted.remarks,
        ),
        "throughput": verdict.judge_throughput(figures["delivered_per_second"], ratio, known["ratio"], note),
        "memory": verdict.judge_memory(peak_heap, bound, allowance, known["peak_heap_bytes"], late=late),
        "drain": verdict.judge_drain(figures["drain_seconds"], known["drain_seconds"]),
    }
    findings["overall"] = verdict.overall(findings)
    return {
        "schema": SCHEMA,
        "started": started,
        "finished": results.now(),
        "interrupted": interrupts.seen(),
        "verdict": {name: finding._asdict() for name, finding in findings.items()},
        **figures,
        "calibration": calibration,
        "ratio": ratio,
        "peak_heap_bytes": peak_heap,
        "peak_rss_bytes": peak_rss,
        "heap": {"bound_bytes": bound, "peak_buffered_bytes": fullest, "seconds": traced.load_seconds},
        "census": vars(counted),
        "sink": None if found is None else vars(found),
        "baseline": None if compared is None else compared.name,
        "problems": problems,
        "config": asdict(config),
        "environment": place,
        "samples": None if stream is None else stream.path.name,
    }


def _figures(config: Config, load: Load, outcome: Outcome, counted: census.CensusResult) -> tuple[Any, list[str]]:
    accepted, refused, delivered = sum(load.accepted), load.refused, load.delivered
    nbytes = sum(taken.nbytes for taken in load.taken)
    problems = list(outcome.problems)
    stats = outcome.stats
    if stats is not None:
        if outcome.problems:
            accepted = stats.accepted  # a producer that raised has left its own count a round behind
        charged = delivered if config.payload == 0 else nbytes
        # enqueue_many counts a refused call once; producers that wait are never refused.
        comparable = not outcome.problems and (config.bulk == 1 or config.on_full == "block")
        ours = (accepted, delivered, charged, charged, refused if comparable else stats.rejected)
        theirs = (stats.accepted, stats.delivered, stats.accepted_bytes, stats.delivered_bytes, stats.rejected)
        if ours != theirs:
            what = "accepted, delivered, bytes of both, refused"
            problems.append(f"{what}: producers and consumers count {ours}, stats() says {theirs}")
    if config.payload_size is not None and nbytes != config.payload_size * delivered:
        problems.append(f"{delivered} payloads of {config.payload_size} bytes cannot make the {nbytes} delivered")

    missing = sum(sent.probes for sent in load.sent) - sum(taken.probes for taken in load.taken)
    if outcome.problems:
        missing = 0
    elif missing:
        problems.append(f"{abs(missing)} probes {'lost' if missing > 0 else 'too many'}")
    elif sum(sent.checksum for sent in load.sent) != sum(taken.checksum for taken in load.taken):
        problems.append("the checksums of the probes sent and received differ")
    if disordered := sum(taken.out_of_order for taken in load.taken):
        problems.append(f"{disordered} probes came out of order")

    latencies = Latencies()
    for taken in load.taken:
        latencies.update(taken.latencies)
    mean = sum(load.accepted) / config.producers
    return {
        **outcome.as_json(),
        "delivered_per_second": delivered / outcome.seconds if outcome.seconds else 0.0,
        "accepted": accepted,
        "rejected": refused,
        "delivered": delivered,
        "delivered_bytes": nbytes,
        # The probes are a part of the load's events: what counts show already is not added a second time.
        "lost": max(0, accepted - delivered, missing) + counted.lost,
        "duplicated": max(0, delivered - accepted, -missing) + counted.duplicated,
        "batches": sum(taken.batches for taken in load.taken),
        "latency_seconds": latencies.as_json(),
        "slowest_producer_share": min(load.accepted) / mean if mean else None,
    }, problems


def summary(result: Mapping[str, Any]) -> list[str]:
    found, latency, slowest = result["verdict"], result["latency_seconds"], result["slowest_producer_share"]
    early = f" (interrupted: the load lasted {format_seconds(result['load_seconds'])})" if result["interrupted"] else ""
    text = {
        "rate": f"{result['delivered_per_second']:,.0f} events/s, {result['ratio'] or 0:.3f} of the calibration"
        f" ({result['calibration']:,.0f} events/s with no dispatcher)",
        "events": f"{result['accepted']:,} accepted, {result['delivered']:,} delivered in {result['batches']:,}"
        f" batches, {result['rejected']:,} refused; slowest producer {slowest or 0:.0%} of the mean",
        "heap": f"peak {format_size(result['peak_heap_bytes'])}, buffer limit"
        f" {format_size(result['config']['max_buffered_bytes'])}; peak RSS {format_size(result['peak_rss_bytes'])}",
        "latency": f"p50 {format_seconds(latency['p50'])}, p99 {format_seconds(latency['p99'])},"
        f" max {format_seconds(latency['max'])} ({latency['samples']:,} probes)",
        "end": f"drained in {format_seconds(result['drain_seconds'])},"
        f" shut down in {format_seconds(result['shutdown_seconds'])}",
        "on": environment.line(result["environment"]),
    }
    return [
        f"{found['overall']['status'].upper()}: {found['overall']['note']}{early}",
        *(f"  {name:<12} {found[name]['status']}: {found[name]['note']}" for name in found if name != "overall"),
        *(f"{name:<13} {words}" for name, words in text.items()),
    ]
