# SPDX-License-Identifier: MIT
"""The server of the http sink's tests, a process: ``python3 -m soak.sinks.receiver PORT FILE``.

It appends the body of each POST to the file, whole or not at all, and answers 204; 503 between one SIGUSR1 and the
next, and 507 when the disk is full. It ignores Idempotency-Key: what is repeated shows.
"""

from __future__ import annotations

import gzip
import os
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

    def store(self, body: bytes) -> bool:
        """Append; return False, with nothing of it in the file, when the disk is full."""
        with self.lock:
            size = os.fstat(self.file.fileno()).st_size
            try:
                view = memoryview(body)
                while view:
                    view = view[self.file.write(view) :]
            except OSError:
                self.file.truncate(size)
                return False
        return True


def drop_torn(path: str) -> None:
    """Remove the line without an end that a killed receiver has left."""
    with open(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        newline = -1
        while end and newline < 0:
            start = max(0, end - (1 << 16))
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            end = start
        file.truncate(end + newline + 1)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Receiver

    def do_POST(self) -> None:
        """Store the body."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.send_response(503 if self.server.refusing else 204 if self.server.store(body) else 507)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


if __name__ == "__main__":
    Receiver(int(sys.argv[1]), sys.argv[2]).serve_forever()
