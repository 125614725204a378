# SPDX-License-Identifier: MIT
"""The ``hostile`` command: every case in a process of its own, and a table of what came of it."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from soak.hostile import CASES, FAMILIES, Case, LeftOut, cases
from soak.options import complain, converter

ROOT = Path(__file__).resolve().parent.parent.parent
GRACE = 10.0
"""Seconds that a process has beyond its limit for telling where it stands, and for starting on a busy machine."""


class Outcome(NamedTuple):
    """What came of one case."""

    case: Case
    status: str  # "pass", "fail" or "left out"
    tried: int
    seconds: float
    note: str


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of ``python3 -m soak``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "hostile",
        help="try to break tempo: hostile callers, fork and exit, other worlds, misuse",
        description="Try to break tempo, each case in a process of its own with a time limit.",
        epilog="exit code: 0 nothing broke, 1 something did, 2 a bad option; "
        "example: python3 -m soak hostile --family forks --scale 0.1",
        allow_abbrev=False,
    )
    parser.set_defaults(main=main, parser=parser)
    parser.add_argument("--family", choices=[*FAMILIES, "all"], default="all", help="which cases (%(default)s)")
    parser.add_argument("--case", metavar="NAME", help="one case alone, here, and not in a process of its own")
    parser.add_argument(
        "--scale",
        type=converter(_parse_scale),
        default=1.0,
        metavar="SHARE",
        help="which share of each case's repetitions (%(default)s)",
    )
    parser.add_argument("--json", metavar="PATH", help="write the outcomes there too")


def _parse_scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = -1.0
    if not 0 < scale <= 100:
        raise ValueError(f"{text!r} is no share: a number above 0, at most 100")
    return scale


def load() -> None:
    """Register the cases of all families."""
    for family in FAMILIES:
        importlib.import_module(f"soak.hostile.{family}")


def main(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    load()
    if options.case is not None:
        if options.case not in CASES:
            options.parser.error(f"argument --case: {options.case!r} is none of {', '.join(sorted(CASES))}")
        return here(CASES[options.case], options.scale)
    outcomes = []
    for found in cases(list(FAMILIES) if options.family == "all" else [options.family]):
        outcome = attempt(found, options.scale)
        outcomes.append(outcome)
        print(
            f"{outcome.status:8}  {found.name}  {outcome.tried} in {outcome.seconds:.1f} s  {outcome.note}", flush=True
        )
    for line in table(outcomes):
        print(line)
    if options.json is not None:
        try:
            Path(options.json).write_text(
                json.dumps([{**o._asdict(), "case": o.case.name} for o in outcomes], indent=1)
            )
        except OSError as error:
            complain(f"cannot write {options.json!r}: {error.strerror}")
            return 1
    return int(any(outcome.status == "fail" for outcome in outcomes))


def here(found: Case, scale: float) -> int:
    """Run one case in this process; its outcome is the last line on stdout."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(found.limit * max(1.0, scale), exit=True)
    try:
        tried = found.run(scale)
    except LeftOut as reason:
        print(f"left out: {reason}", flush=True)
        return 0
    finally:
        faulthandler.cancel_dump_traceback_later()
    print(f"tried: {tried}", flush=True)
    return 0


def command(found: Case, scale: float) -> list[str]:
    """What runs one case."""
    return [sys.executable, "-X", "utf8", "-m", "soak", "hostile", "--case", found.name, "--scale", str(scale)]


def attempt(found: Case, scale: float) -> Outcome:
    """Run one case in a process of its own, and end all that it left behind."""
    begin = time.monotonic()
    process = subprocess.Popen(
        command(found, scale),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    hung = False
    try:
        out, err = process.communicate(timeout=found.limit * max(1.0, scale) + GRACE)
    except subprocess.TimeoutExpired:
        hung = True
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):  # none is left, as it should be
            os.killpg(process.pid, signal.SIGKILL)
    seconds = time.monotonic() - begin
    last = out.splitlines()[-1] if out else ""
    if process.returncode == 0 and not err and last.startswith("left out: "):
        return Outcome(found, "left out", 0, seconds, last[len("left out: ") :])
    if process.returncode == 0 and not err and last.startswith("tried: "):
        return Outcome(found, "pass", int(last[len("tried: ") :]), seconds, "")
    why = "hung" if hung or "Timeout (" in err else f"exit code {process.returncode}"
    return Outcome(found, "fail", 0, seconds, f"{why}\n{err[-4000:]}")


def table(outcomes: list[Outcome]) -> list[str]:
    """Lines that say per family how many cases there were, and what came of them."""
    lines = [f"{'family':16}  {'cases':>5}  {'tried':>10}  {'broken':>6}  {'left out':>8}  {'seconds':>7}"]
    for family, title in FAMILIES.items():
        mine = [outcome for outcome in outcomes if outcome.case.family == family]
        if mine:
            broken, without = (sum(o.status == status for o in mine) for status in ("fail", "left out"))
            tried, seconds = sum(o.tried for o in mine), sum(o.seconds for o in mine)
            lines.append(f"{title:16}  {len(mine):5}  {tried:10,}  {broken:6}  {without:8}  {seconds:7.1f}")
    return lines
