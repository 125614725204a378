# SPDX-License-Identifier: MIT
"""Entry of ``python3 -m soak``: finds the command and turns a bad option into one line and exit code 2.

A command is a module with ``add_parser(commands)``, which sets ``main`` to a function from the parsed options to the
exit code.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from soak import bench, instructions, mutants, overhead, pi, record, report, run, stress, tune
from soak.crew import describe
from soak.hostile import command as hostile
from soak.interleave import command as interleave
from soak.options import OneLineParser, attach_values, complain
from soak.sinks import command as sinks

COMMANDS = (run, tune, stress, record, report, pi, sinks, bench, overhead, instructions, hostile, interleave, mutants)


def parser() -> OneLineParser:
    """Return what parses all commands' options."""
    whole = OneLineParser(
        prog="python3 -m soak",
        description="Soak harness of tempo, the in-process batching dispatcher.",
        epilog="example: python3 -m soak run --duration 30s",
    )
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return whole


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit code (0 well, 1 a failed verdict or an unwritten file, 2 a bad option)."""
    options = parser().parse_args(attach_values(sys.argv[1:] if argv is None else argv))
    command_main: Callable[..., int] = options.main
    return command_main(options)


def entry() -> int:
    """Run one command; tell in one line what commands do not look after: an interrupt, a full disk, a closed pipe."""
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EPIPE, errno.EIO):
            complain(f"cannot write to stdout: {error.strerror}")
            # What is still in its buffer would fail once more, with a traceback, as the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            complain(describe(error))
        return 1
    return code


if __name__ == "__main__":
    sys.exit(entry())
