# SPDX-License-Identifier: MIT
"""Between a sink and its server, which must be up, a process: ``python3 -m soak.sinks.relay PORT TO``.

It passes bytes on both ways; at SIGUSR1 it resets every connection, in the middle of whatever passes.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import struct
import sys

HOST = "127.0.0.1"


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on one direction until it ends."""
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


async def main(port: int, to: int) -> None:
    """Relay for ever."""
    writers: set[asyncio.StreamWriter] = set()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection(HOST, to)
        writers.update((writer, other_writer))
        await asyncio.gather(pump(reader, other_writer), pump(other_reader, writer))
        writers.difference_update((writer, other_writer))

    def reset() -> None:
        for writer in writers:
            # RST in place of FIN.
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, reset)
    server = await asyncio.start_server(connect, HOST, port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
