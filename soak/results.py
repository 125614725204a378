# SPDX-License-Identifier: MIT
"""The files of one run, and the summary for people.

A result is never lost to a full disk or a folder that cannot be written: it is then printed on stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soak.options import complain
from soak.progress import Stream, say
from soak.units import format_seconds, format_size


def replace(path: Path, content: bytes) -> None:
    """Write a whole file; what stood there stays whole until the new one is. Raises OSError."""
    if path.exists() and not path.is_file():  # a device or a pipe: not to be replaced
        path.write_bytes(content)
        return
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def as_text(result: Mapping[str, object]) -> str:
    """Return the result as JSON that people can read: an item a line, a pair of numbers on one."""
    text = json.dumps(result, indent=2) + "\n"
    # A string holds no line break in JSON, so this finds lists alone.
    return re.sub(r"\[\s*\n\s*([-+.\de]+),\s+([-+.\de]+)\s+\]", r"[\1, \2]", text)


class Files:
    """Where one run's results go: ``out/soak-TIME.jsonl``, ``out/latest.json``, and the result itself.

    Of another command than ``run``, named ``kind``, the result alone: it has no stream, and is not the latest run.

    Each trouble is told once, in one line on stderr; ``well`` is then False.
    """

    def __init__(self, out: Path, path: Path | None, kind: str = "soak") -> None:
        self.well = True
        self.started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.written: list[Path] = []
        self.stream: Stream | None = None
        self._path = path
        self._out: Path | None = out
        self._stem = f"{kind}-" + time.strftime("%Y%m%d-%H%M%S")
        self._latest = kind == "soak"
        try:
            out.mkdir(parents=True, exist_ok=True)
            if self._latest:
                self.stream = self._new_stream(out)
        except OSError as error:
            self._trouble(f"cannot write to --out {str(out)!r}", error)
            self._out = None

    def _new_stream(self, out: Path) -> Stream:
        stem, attempt = self._stem, 1
        while True:
            with contextlib.suppress(FileExistsError):
                return Stream(out / f"{self._stem}.jsonl")
            attempt += 1
            self._stem = f"{stem}_{attempt}"

    def finish(self, result: Mapping[str, object]) -> str | None:
        """Close the stream and write the result; return its text when it has to be printed instead."""
        told = False
        if self.stream is not None:
            self.stream.close()
            if self.stream.error is not None:
                told = True
                self._trouble(f"cannot write {str(self.stream.path)!r}", self.stream.error)
            else:
                self.written.append(self.stream.path)
        text = as_text(result)
        if self._path is not None:
            self._write(self._path, text, "--json ")
        if self._out is not None:
            own = [] if self._path is not None else [self._out / f"{self._stem}.json"]
            latest = [self._out / "latest.json"] if self._latest else []
            # Whatever keeps one file in a folder from being written keeps the next: told once.
            all(self._write(path, text, "", told) for path in (*own, *latest))
        return None if self.well else text

    def _write(self, path: Path, text: str, option: str, told: bool = False) -> bool:
        try:
            replace(path, text.encode())
        except OSError as error:
            if not told:
                self._trouble(f"cannot write {option}{str(path)!r}", error)
            return False
        self.written.append(path)
        return True

    def _trouble(self, what: str, error: OSError) -> None:
        self.well = False
        complain(f"{what}: {error.strerror or error}; the result goes to stdout")


def tell(text: str, unwritten: str | None) -> None:
    """Print the summary; the result itself when it could not be written, and the summary then on stderr."""
    if unwritten is None:
        print(text, flush=True)
    else:
        say(text)
        sys.stdout.write(unwritten)
        sys.stdout.flush()


def summary(result: Mapping[str, Any], records: list[str], written: list[Path]) -> str:
    """Return about a dozen lines for people, the verdict first."""
    verdict, place, calibration = result["verdict"], result["environment"], result["calibration"]
    latency, settings = result["latency_seconds"], result["config"]
    ratio = "not measured" if result["ratio"] is None else f"{result['ratio']:.3f} of the calibration"
    lines = [f"{verdict['overall']['status'].upper()}: {verdict['overall']['note']}"]
    if result["interrupted"]:
        lines[0] += f" (interrupted: the load lasted {format_seconds(result['load_seconds'])})"
    lines += [
        f"  {name:<12} {verdict[name]['status']}: {verdict[name]['note']}"
        for name in ("correctness", "throughput", "memory", "drain")
    ]
    lines += [
        f"rate          {result['delivered_per_second']:,.0f} events/s, {ratio}"
        + ("" if calibration is None else f" ({calibration:,.0f} events/s with no dispatcher)"),
        f"events        {result['accepted']:,} accepted, {result['delivered']:,} delivered in {result['batches']:,}"
        f" batches, {result['rejected']:,} refused; slowest producer {_share(result['slowest_producer_share'])}"
        " of the mean",
        f"heap          peak {show_peak(result['peak_heap_bytes'])}, buffer limit"
        f" {format_size(settings['max_buffered_bytes'])}; peak RSS "
        + ("?" if result["peak_rss_bytes"] is None else format_size(result["peak_rss_bytes"])),
        f"latency       p50 {format_seconds(latency['p50'])}, p99 {format_seconds(latency['p99'])},"
        f" max {format_seconds(latency['max'])} ({latency['samples']:,} probes)",
        f"end           drained in {format_seconds(result['drain_seconds'])},"
        f" shut down in {format_seconds(result['shutdown_seconds'])}",
        f"on            {place['machine']}, {place['cores']} cores, {place['interpreter']} ({place['python']},"
        f" {place['build']}), commit {(place['commit'] or 'unknown')[:12]}",
    ]
    if records:
        lines.append(f"on record     (not compared) {'; '.join(records)}")
    lines.append(f"written       {', '.join(map(str, written)) or 'nothing'}")
    return "\n".join(lines)


def show_peak(peak: int | None) -> str:
    """Return the traced peak (bytes) for people."""
    return "not measured" if peak is None else format_size(peak)


def _share(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.0f} %"
