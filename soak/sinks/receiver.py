# SPDX-License-Identifier: MIT
"""The server of the http sink's tests, a process: ``python3 -m soak.sinks.receiver PORT FILE``.

It appends the body of each POST to the file, whole or not at all, and answers 204; 503 between one SIGUSR1 and the
next, and 507 when the disk is full. It ignores Idempotency-Key: what is repeated shows.
"""

from __future__ import annotations

import contextlib
import mmap
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import FileIO


class Handler(BaseHTTPRequestHandler):
    """One connection; what all have in common is the class's."""

    protocol_version = "HTTP/1.1"
    file: FileIO
    lock = threading.Lock()
    refusing = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(503 if self.refusing else self.store(body))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def store(self, body: bytes) -> int:
        """Append; return the answer: with nothing of it in the file when the disk is full."""
        with self.lock:
            size = self.file.seek(0, 2)
            with contextlib.suppress(OSError):
                if self.file.write(body) == len(body):
                    return 204
            self.file.truncate(size)
            return 507

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def turn(*_: object) -> None:
    """Refuse, or no longer."""
    Handler.refusing = not Handler.refusing


def drop_torn(path: str) -> None:
    """Remove the line without an end that a killed receiver has left."""
    with open(path, "a+b") as file:
        if file.seek(0, 2):
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                end = text.rfind(b"\n") + 1
            file.truncate(end)


if __name__ == "__main__":
    drop_torn(sys.argv[2])
    Handler.file = FileIO(sys.argv[2], "ab")
    signal.signal(signal.SIGUSR1, turn)
    ThreadingHTTPServer.request_queue_size = 64
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
