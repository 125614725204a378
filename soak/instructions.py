# SPDX-License-Identifier: MIT
"""The ``instructions`` command: how many machine instructions a payload costs, counted by valgrind's callgrind.

No clock is read, so neither other programs nor the processor's mood matter. The interpreter runs twice, with fewer and
with more payloads; the difference leaves out start, imports and warming up. A figure is good for one build of an
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from soak import baseline, cli, environment, results
from soak.cli import complain

FILE = baseline.FOLDER / "bench" / "instructions.json"
TOLERANCE = 0.02
"""A figure may exceed the recorded one by that much: valgrind and the C library have a part in it, too."""
FEWER, MORE = 8, 40
"""Times that the payloads of ``soak.benchmarks`` go through; the fewer also warm up."""
SUBJECTS = {
    "enqueue": "enqueue",
    "enqueue_many": "enqueue_many",
    "way": "way",
    "large": "large",
    "queue_put": "queue_put",  # the control: it changes with the interpreter alone
    "load": "one_thread",
}
PROGRAM = (
    "import sys; sys.path.insert(0, {root!r}); from soak.benchmarks import *; d = {setup}\nfor _ in range({times}): d()"
)


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of ``python3 -m soak``."""
    purpose = "Count instructions under valgrind's callgrind; fail when there are more than recorded."
    epilog = "example: python3 -m soak instructions\n\nexit code: 0 not more than recorded (or nothing recorded for"
    epilog += " this build), 1 more, valgrind failed, or the\nrecord cannot be written, 2 a bad option, or no valgrind"
    add = cli.add_command(commands, "instructions", main, purpose, epilog)
    add("--record", choices=("yes", "no"), default="no", help="record the figures of this build (%(default)s)")


def main(options: argparse.Namespace) -> int:
    """Count, and compare or record; return the exit code."""
    if shutil.which("valgrind") is None:
        options.parser.error("valgrind is not installed: sudo apt install valgrind")
    try:
        counted = count()
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        complain(str(error))
        return 1
    build = f"{platform.python_implementation()} {platform.python_version()} {' '.join(platform.python_build())}"
    build += f" {platform.python_compiler()} {platform.machine()}"
    recorded: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    before = recorded.get(build, {}).get("instructions_per_payload", {})
    more = False
    for name, value in counted.items():
        line = f"{name:<14} {value:>7,.0f} instructions a payload"
        if options.record == "no" and name in before:
            worse = value > before[name] * (1 + TOLERANCE)
            more |= worse
            line += f", recorded {before[name]:,.0f}{': MORE' if worse else ''}"
        print(line, flush=True)
    if options.record == "yes":
        recorded[build] = {"commit": environment.describe()["commit"], "instructions_per_payload": counted}
        return 0 if results.write(FILE, (json.dumps(recorded, indent=2, sort_keys=True) + "\n").encode()) else 1
    if not before:
        print(f"nothing recorded for {build}: --record yes would")
    return 1 if more else 0


def count() -> dict[str, float]:
    """Return the instructions a payload of each subject. Raises RuntimeError when valgrind fails."""
    from soak.benchmarks import BLOCKS, CALLS  # noqa: PLC0415 - not for --help

    jobs = [(name, times) for name in SUBJECTS for times in (FEWER, MORE)]
    with ThreadPoolExecutor(environment.cores()) as pool:
        totals = dict(zip(jobs, pool.map(lambda job: _run(*job), jobs)))
    payloads = {"large": len(BLOCKS)}
    return {
        name: round((totals[name, MORE] - totals[name, FEWER]) / ((MORE - FEWER) * payloads.get(name, CALLS)), 1)
        for name in SUBJECTS
    }


def _run(name: str, times: int) -> int:
    """Return the instructions of one run of the interpreter."""
    program = PROGRAM.format(root=str(environment.ROOT), setup=SUBJECTS[name], times=times)
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={Path(folder, 'out')}"]
        command += [os.path.realpath(sys.executable), "-S", "-c", program]
        variables = {**os.environ, "PYTHONHASHSEED": "0"}  # or the hashes of strings differ from start to start
        done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=600, check=False)
    found = re.search(r"Collected : ([0-9]+)", done.stderr)
    if done.returncode or found is None:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(f"{name}: valgrind failed: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return int(found[1])
