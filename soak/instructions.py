# SPDX-License-Identifier: MIT
"""The ``instructions`` command: how many machine instructions a payload costs, counted by valgrind.

No clock is read, so neither other jobs nor the processor's mood matter: two runs of one interpreter build give the same
figure. The interpreter runs twice under callgrind, with fewer and with more payloads; the difference of the counts over
the difference of the payloads leaves out start, imports and warming up. A figure is good for one build of an
interpreter only, so each recorded one names its build.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from soak import baseline, environment, results
from soak.options import complain, converter

FILE = baseline.FOLDER / "bench" / "instructions.json"
TOLERANCE = 0.02
"""A figure may exceed the recorded one by that much: valgrind and the C library have a part in it, too."""
FEWER, MORE = 8, 40
"""Times that as many payloads as ``soak.micro`` has go through; the fewer are also what warms up."""
PATIENCE = 600.0

SUBJECTS = {
    "enqueue": "d = micro.Enqueue()",
    "enqueue_many": "d = micro.EnqueueMany()",
    "way": "d = micro.Way()",
    "queue_put": "d = micro.queue_put",
    "load_unwatched": "d = micro.OneThread(probes=False)",
    "load": "d = micro.OneThread(probes=True)",
}
"""What is counted, and the code that makes it. ``queue_put`` is the control: it changes with the interpreter alone.
``load`` less ``load_unwatched`` is what the probes cost; what time tells of that, see ``overhead``."""

PROGRAM = "import sys; sys.path.insert(0, {root!r}); from soak import micro; {setup}\nfor _ in range({times}): d()"


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of ``python3 -m soak``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "instructions",
        help="machine instructions a payload, counted by valgrind, against the recorded ones",
        description="Count instructions under valgrind's callgrind; fail when there are more than recorded.",
        epilog="exit code: 0 not more than recorded (or nothing recorded for this build), 1 more, valgrind failed, or "
        "the record cannot be written, 2 a bad option",
        allow_abbrev=False,
    )
    parser.set_defaults(main=main, parser=parser)
    parser.add_argument(
        "--record",
        type=converter(_parse_record),
        metavar="yes|no",
        default="no",
        help="write the figures for this build instead of comparing them (%(default)s)",
    )


def _parse_record(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(f"{text!r} is neither yes nor no")
    return text == "yes"


def build() -> str:
    """Return what names this build of the interpreter."""
    return (
        f"{platform.python_implementation()} {platform.python_version()} {' '.join(platform.python_build())}"
        f" {platform.python_compiler()} {platform.machine()}"
    )


def main(options: argparse.Namespace) -> int:
    """Count, and compare or record; return the exit code."""
    if shutil.which("valgrind") is None:
        options.parser.error("valgrind is not installed: sudo apt install valgrind")
    try:
        counted = count()
    except RuntimeError as error:
        complain(str(error))
        return 1
    recorded: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    unwritten = False
    if options.record:
        recorded[build()] = {"commit": environment.describe()["commit"], "instructions_per_payload": counted}
        try:
            FILE.parent.mkdir(parents=True, exist_ok=True)
            results.replace(FILE, (json.dumps(recorded, indent=2, sort_keys=True) + "\n").encode())
        except OSError as error:
            complain(f"cannot write {str(FILE)!r}: {error.strerror or error}")
            unwritten = True
    entry = recorded.get(build())
    before: Mapping[str, float] = entry["instructions_per_payload"] if entry is not None else {}
    lines, more = judge(counted, before)
    print("\n".join(lines))
    if entry is None:
        print(f"nothing recorded for {build()}: --record yes would")
    return 1 if more or unwritten else 0


def judge(counted: Mapping[str, float], before: Mapping[str, float]) -> tuple[list[str], bool]:
    """Return a line a subject, and whether one of tempo's costs more than before.

    >>> judge({"enqueue": 1030.0}, {"enqueue": 1000.0})
    (['enqueue          1,030 instructions a payload, recorded 1,000: MORE'], True)
    >>> judge({"enqueue": 990.0}, {"enqueue": 1000.0})
    (['enqueue            990 instructions a payload, recorded 1,000'], False)
    """
    lines, worse = [], False
    for name, value in counted.items():
        line = f"{name:<14} {value:>7,.0f} instructions a payload"
        if name in before:
            line += f", recorded {before[name]:,.0f}"
            if value > before[name] * (1 + TOLERANCE):
                line += ": MORE"
                worse = True
        lines.append(line)
    return lines, worse


def count() -> dict[str, float]:
    """Return the instructions a payload of each subject. Raises RuntimeError when valgrind fails."""
    from soak.micro import PAYLOADS  # noqa: PLC0415 - not for --help

    jobs = [(name, times) for name in SUBJECTS for times in (FEWER, MORE)]
    with ThreadPoolExecutor(environment.cores()) as pool:
        totals = dict(zip(jobs, pool.map(lambda job: _run(*job), jobs)))
    return {
        name: round((totals[name, MORE] - totals[name, FEWER]) / ((MORE - FEWER) * len(PAYLOADS)), 1)
        for name in SUBJECTS
    }


def _run(name: str, times: int) -> int:
    """Return the instructions of one run of the interpreter."""
    program = PROGRAM.format(root=str(environment.ROOT), setup=SUBJECTS[name], times=times)
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={Path(folder, 'out')}"]
        command += [os.path.realpath(sys.executable), "-S", "-c", program]
        # What differs from one start to the next otherwise: the hashes of strings.
        variables = {**os.environ, "PYTHONHASHSEED": "0"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=PATIENCE, check=False)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{name}: valgrind did not end within {PATIENCE:.0f} s") from None
    found = re.search(r"Collected : ([0-9]+)", done.stderr)
    if done.returncode or found is None:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(f"{name}: valgrind failed: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return int(found[1])
