# SPDX-License-Identifier: MIT
"""The files of one run. A result is never lost to a full disk or a read-only folder: it is then printed on stdout."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from soak.cli import complain, say
from soak.display import Stream


def now() -> str:
    """Return the time as results have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def write(path: Path, content: bytes, instead: str = "") -> bool:
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
        complain(f"cannot write {str(path)!r}: {error.strerror or error}{instead}")
        return False
    return True


class Files:
    """Where one command's results go: ``out/KIND-TIME.json``, and for ``soak`` a stream of samples and ``latest.json``.
    After trouble, which is told in one line, ``well`` is False."""

    def __init__(self, out: Path, path: Path | None, kind: str = "soak") -> None:
        self.well = True
        self.started = now()
        self.stream: Stream | None = None
        self._out, self._path, self._kind = out, path, kind
        self._stem = f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9 // 1000:06d}"
        if kind == "soak":
            try:
                out.mkdir(parents=True, exist_ok=True)
                self.stream = Stream(out / f"{self._stem}.jsonl")
            except OSError as error:
                self._trouble(f"cannot write to --out {str(out)!r}", error)

    def _trouble(self, what: str, error: OSError) -> None:
        self.well = False
        complain(f"{what}: {error.strerror or error}; the result goes to stdout")

    def finish(self, result: Mapping[str, object], summary: list[str]) -> None:
        """Close the stream, write the result, print the summary; the result itself when it could not be written."""
        written = []
        if self.stream is not None:
            self.stream.close()
            written.append(self.stream.path)
            if self.stream.error is not None:
                self._trouble(f"cannot write {str(written.pop())!r}", self.stream.error)
        text = json.dumps(result, indent=2) + "\n"
        wanted = [self._path or self._out / f"{self._stem}.json"]
        wanted += [self._out / "latest.json"] if self._kind == "soak" else []
        for path in wanted:
            # Whatever keeps one file in a folder from being written keeps the next: told once.
            if self.well or path == self._path:
                if write(path, text.encode(), "; the result goes to stdout"):
                    written.append(path)
                else:
                    self.well = False
        lines = "\n".join([*summary, f"written       {', '.join(map(str, written)) or 'nothing'}"])
        if self.well:
            print(lines, flush=True)
        else:
            say(lines)
            print(text, end="", flush=True)
