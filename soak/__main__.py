# SPDX-License-Identifier: MIT
"""Entry of ``python3 -m soak``: a table of commands, each a module that is imported when it is asked for. Its
``add_parser(commands)`` adds its options and sets ``main``, a function from the parsed options to the exit code."""

from __future__ import annotations

import errno
import importlib
import os
import sys

from soak.cli import Failure, OneLineParser, complain

COMMANDS = {
    "run": ("soak.run", "sustained load: is every event delivered once, how fast, in how much memory"),
    "tune": ("soak.tune", "limits that fit this machine and payload size; run then uses them"),
    "stress": ("soak.stress", "256 producers, 2,000 payloads each: are all of them delivered"),
    "baseline": ("soak.baseline", "record this machine's figures, for run to compare with"),
    "report": ("soak.report", "one HTML page and one picture of a run"),
    "pi": ("soak.pi", "the same on a Raspberry Pi's processor: on one, or emulated"),
    "sinks": ("soak.sinks.command", "real servers behind it, faults under load, every event read back"),
    "bench": ("soak.bench", "what a call costs, what a soak reaches, with controls and peers in the same run"),
    "instructions": ("soak.instructions", "machine instructions a payload, counted by valgrind"),
    "interleave": ("soak.interleave.command", "calls stopped at each of their bytecodes while others run"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code (0 well, 1 a failed verdict or an unwritten file, 2 a bad option)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = OneLineParser(
        prog="python3 -m soak",
        description="Soak harness of tempo, the in-process batching dispatcher.",
        epilog="example: python3 -m soak run --duration 30s",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, purpose) in COMMANDS.items():
        if argv[:1] == [name]:
            importlib.import_module(module).add_parser(commands)
        else:
            commands.add_parser(name, help=purpose)
    options = parser.parse_args(argv)
    try:
        return int(options.main(options))
    except Failure as error:
        complain(str(error))
        return 1


def entry() -> int:
    """Run one command; tell in one line what commands do not handle: an interrupt, a full disk, a closed pipe."""
    try:
        code = main()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        complain("interrupted: there is no result")
        return 130
    except OSError as error:
        full = error.filename is None and error.errno in (errno.ENOSPC, errno.EPIPE, errno.EIO)
        complain(f"cannot write to stdout: {error.strerror}" if full else f"{type(error).__name__}: {error}")
        return 1


if __name__ == "__main__":
    try:
        exit_code = entry()
    finally:  # for SystemExit of argparse too
        # Empty a stream that is full: the interpreter would flush it again at its end, and exit with code 120.
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(exit_code)
