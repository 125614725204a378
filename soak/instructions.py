# SPDX-License-Identifier: MIT
"""The ``instructions`` command: how many machine instructions a payload costs, counted by valgrind's callgrind.

Other programs do not matter. The interpreter runs twice, with fewer and with more payloads; the difference leaves out
start, imports and warming up. A figure holds for one build of an interpreter, so each recorded one names its build.
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
from soak.cli import Failure

FILE = baseline.FOLDER / "bench" / "instructions.json"
TOLERANCE = 0.02  # a figure may exceed the recorded one by that much: valgrind and the C library have a part in it, too
FEWER, MORE = 8, 40  # times that the payloads of ``soak.benchmarks`` go through; the fewer also warm up
SUBJECTS = ("enqueue", "enqueue_many", "way", "large", "queue_put")
"""Of ``soak.benchmarks``. queue_put is the control: it changes with the interpreter alone."""
PROGRAM = "import sys; sys.path.insert(0, {!r}); from soak.benchmarks import {} as work\nfor _ in range({}): work()"


def add_parser(commands: Any) -> None:
    purpose = "Count instructions under valgrind's callgrind; fail when there are more than recorded."
    add = cli.add_command(commands, "instructions", main, purpose, "example: python3 -m soak instructions\n")
    add("--record", choices=("yes", "no"), default="no", help="record the figures of this build (%(default)s)")


def main(options: argparse.Namespace) -> int:
    if shutil.which("valgrind") is None:
        options.parser.error("valgrind is not installed: sudo apt install valgrind")
    counted = count()
    place = environment.describe()
    known = ("python", "build", "compiler", "architecture")
    build = " ".join([platform.python_implementation(), *(str(place[key]) for key in known)])
    recorded: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    before = {} if options.record == "yes" else recorded.get(build, {}).get("instructions_per_payload", {})
    worse = [name for name in counted if name in before and counted[name] > before[name] * (1 + TOLERANCE)]
    for name, value in counted.items():
        against = f", recorded {before[name]:,.0f}{': MORE' * (name in worse)}" if name in before else ""
        print(f"{name:<14} {value:>7,.0f} instructions a payload{against}", flush=True)
    if options.record == "yes":
        recorded[build] = {"commit": place["commit"], "instructions_per_payload": counted}
        return 0 if results.write(FILE, (json.dumps(recorded, indent=2, sort_keys=True) + "\n").encode()) else 1
    if not before:
        print(f"nothing recorded for {build}: --record yes would")
    return 1 if worse else 0


def count() -> dict[str, float]:
    """Return the instructions a payload of each subject. Raises Failure when valgrind fails."""
    from soak.benchmarks import BLOCKS, CALLS  # noqa: PLC0415 - not for --help

    def counted(name: str) -> float:
        payloads = len(BLOCKS) if name == "large" else CALLS
        return round((_run(name, MORE) - _run(name, FEWER)) / ((MORE - FEWER) * payloads), 1)

    with ThreadPoolExecutor(environment.cores()) as pool:
        return dict(zip(SUBJECTS, pool.map(counted, SUBJECTS)))


def _run(name: str, times: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={Path(folder, 'out')}"]
        command += [os.path.realpath(sys.executable), "-S", "-c", PROGRAM.format(str(environment.ROOT), name, times)]
        variables = {**os.environ, "PYTHONHASHSEED": "0"}  # or the hashes of strings differ from start to start
        done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=600, check=False)
    found = re.search(r"Collected : ([0-9]+)", done.stderr)
    if done.returncode or found is None:
        raise Failure(f"{name}: valgrind failed with exit code {done.returncode}: {done.stderr[-200:]}")
    return int(found[1])
