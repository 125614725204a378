# SPDX-License-Identifier: MIT
"""The files of one run. A result is never lost to a full disk or a read-only folder: it is then printed on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from soak.cli import complain, say
from soak.display import Stream


def now() -> str:
    """Return the time as results have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def write(path: Path, content: bytes, instead: str = "", option: str = "") -> bool:
    """Write a whole file, and its folder; return whether it is there. When not, tell why in one line, and ``instead``.

    A file that is replaced stays whole until the new one is.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a device or a pipe: not to be replaced
            path.write_bytes(content)
            return True
        try:
            part.write_bytes(content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        complain(f"cannot write {option}{str(path)!r}: {error.strerror or error}{instead}")
        return False
    return True


def as_text(result: Mapping[str, object]) -> str:
    """Return the result as JSON that people can read: an item a line, a pair of numbers on one."""
    text = json.dumps(result, indent=2) + "\n"
    # A string holds no line break in JSON, so this finds lists alone.
    return re.sub(r"\[\s*\n\s*([-+.\de]+),\s+([-+.\de]+)\s+\]", r"[\1, \2]", text)


class Files:
    """Where one command's results go: ``out/KIND-TIME.json``, and for ``soak`` a stream of samples and ``latest.json``.

    Each trouble is reported once, in one line on stderr; ``well`` is then False.
    """

    def __init__(self, out: Path, path: Path | None, kind: str = "soak") -> None:
        self.well = True
        self.started = now()
        self.written: list[Path] = []
        self.stream: Stream | None = None
        self._out, self._path, self._kind = out, path, kind
        self._stem = stem = f"{kind}-" + time.strftime("%Y%m%d-%H%M%S")
        if kind != "soak":
            return
        attempt = 1
        try:
            out.mkdir(parents=True, exist_ok=True)
            while self.stream is None:
                with contextlib.suppress(FileExistsError):
                    self.stream = Stream(out / f"{self._stem}.jsonl")
                    break
                attempt += 1
                self._stem = f"{stem}_{attempt}"
        except OSError as error:
            self._trouble(f"cannot write to --out {str(out)!r}", error)

    def _trouble(self, what: str, error: OSError) -> None:
        self.well = False
        complain(f"{what}: {error.strerror or error}; the result goes to stdout")

    def finish(self, result: Mapping[str, object], summary: list[str]) -> None:
        """Close the stream, write the result, print the summary; the result itself when it could not be written."""
        if self.stream is not None:
            self.stream.close()
            if self.stream.error is None:
                self.written.append(self.stream.path)
            else:
                self._trouble(f"cannot write {str(self.stream.path)!r}", self.stream.error)
        text = as_text(result)
        wanted = [(self._path or self._out / f"{self._stem}.json", "--json " if self._path else "")]
        wanted += [(self._out / "latest.json", "")] if self._kind == "soak" else []
        for path, option in wanted:
            # Whatever keeps one file in a folder from being written keeps the next: told once.
            if not self.well and not option:
                break
            if write(path, text.encode(), "; the result goes to stdout", option):
                self.written.append(path)
            else:
                self.well = False
        lines = "\n".join([*summary, f"written       {', '.join(map(str, self.written)) or 'nothing'}"])
        if self.well:
            print(lines, flush=True)
        else:
            say(lines)
            sys.stdout.write(text)
            sys.stdout.flush()
