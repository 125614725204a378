# SPDX-License-Identifier: MIT
"""Between a sink and its server, a process of its own: ``python3 -m soak.sinks.relay PORT TO``.

It hands on bytes both ways; at SIGUSR1 it resets every connection, in the middle of whatever passes through.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import struct
import sys

HOST = "127.0.0.1"


class Relay:
    """All connections through it."""

    def __init__(self, to: int) -> None:
        self._to = to
        self._open: set[asyncio.StreamWriter] = set()

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        try:
            other_reader, other_writer = await asyncio.open_connection(HOST, self._to)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, other_writer}
        self._open |= pair
        try:
            await asyncio.gather(self._pump(reader, other_writer), self._pump(other_reader, writer))
        finally:
            self._open -= pair
            for end in pair:
                end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(OSError, RuntimeError):
            writer.close()

    def reset(self) -> None:
        """Reset all connections: RST, not FIN."""
        for writer in self._open:
            connected = writer.get_extra_info("socket")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


async def main(port: int, to: int) -> None:
    """Relay for ever."""
    relay = Relay(to)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, relay.reset)
    server = await asyncio.start_server(relay.connect, HOST, port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
