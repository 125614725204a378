# SPDX-License-Identifier: MIT
"""A soak with each of several interpreters, as a table in Markdown: is anything lost, how fast, in how much memory?

    python3 .ci/interpreters.py --duration 1m python3.10 python3.13 "PYTHON_GIL=0 python3.13t"

One after the other, so on a quiet machine. Anything lost is exit code 1.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "import sys, platform; print(platform.python_implementation(), sys.version.split()[0], *sys.argv[1:])"
HEAD = """\
| interpreter | delivered | lost, repeated | events/s | of calibration | peak heap, of the buffer | drain |
| --- | --- | --- | --- | --- | --- | --- |"""


def call(command: str, *args: str) -> list[str]:
    """Return the arguments for a command in which environment variables may stand first."""
    return ["env", *shlex.split(command), *args]


def row(command: str, duration: str) -> tuple[str, int]:
    """Run one soak; return its row of the table, and how many events were lost or repeated."""
    chosen = [part for part in shlex.split(command) if "=" in part]
    name = subprocess.run(call(command, "-c", NAME, *chosen), capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "result.json")
        options = ["run", "--duration", duration, "--out", scratch, "--json", str(path), "--baseline", "none"]
        options += ["--settings", "none", "--display", "none"]
        subprocess.run(call(command, "-m", "soak", *options), cwd=ROOT, stdout=sys.stderr, check=False)
        result = json.loads(path.read_text(encoding="utf-8"))
    rate, calibration, heap = (result[key] for key in ("delivered_per_second", "calibration", "peak_heap_bytes"))
    memory = "not traced" if heap is None else f"{heap / result['config']['max_buffered_bytes']:.2f}"
    cells = f"{result['delivered']:,} | {result['lost']}, {result['duplicated']} | {rate:,.0f}"
    text = f"| {name} | {cells} | {rate / calibration:.2f} | {memory} | {1000 * result['drain_seconds']:.1f} ms |"
    return text, result["lost"] + result["duplicated"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Soak tempo with several interpreters; print a table.")
    parser.add_argument("interpreters", nargs="+", metavar="COMMAND", help='"PYTHON_GIL=0 python3.13t", for example')
    parser.add_argument("--duration", default="1m", metavar="TIME", help="of each soak (%(default)s)")
    options = parser.parse_args()
    print(HEAD, flush=True)
    wrong = 0
    for command in options.interpreters:
        text, bad = row(command, options.duration)
        print(text, flush=True)
        wrong += bad
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
