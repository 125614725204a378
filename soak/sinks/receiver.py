# SPDX-License-Identifier: MIT
"""The server of the http sink's tests, a process: ``python3 -m soak.sinks.receiver PORT FILE``.

It appends the body of each POST to the file, whole or not at all, and answers 204; 503 between one SIGUSR1 and the
next, and 507 when the disk is full. It ignores Idempotency-Key: what is repeated shows.
"""

from __future__ import annotations

import gzip
import mmap
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Receiver(ThreadingHTTPServer):
    """Its state."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, path: str) -> None:
        drop_torn(path)
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115
        self.lock = threading.Lock()
        self.refusing = False
        super().__init__(("127.0.0.1", port), Handler)
        signal.signal(signal.SIGUSR1, self._turn)

    def _turn(self, *_: object) -> None:
        self.refusing = not self.refusing

    def store(self, body: bytes) -> int:
        """Append; return the answer: with nothing of it in the file when the disk is full."""
        with self.lock:
            size, view = self.file.seek(0, 2), memoryview(body)
            try:
                while view:
                    view = view[self.file.write(view) :]
            except OSError:
                self.file.truncate(size)
                return 507
        return 204


def drop_torn(path: str) -> None:
    """Remove the line without an end that a killed receiver has left."""
    with open(path, "a+b") as file:
        if file.seek(0, 2):
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                end = text.rfind(b"\n") + 1
            file.truncate(end)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Receiver

    def do_POST(self) -> None:
        """Store the body."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.send_response(503 if self.server.refusing else self.server.store(body))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


if __name__ == "__main__":
    Receiver(int(sys.argv[1]), sys.argv[2]).serve_forever()
