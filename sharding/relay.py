"""A relay for the connections of JAX's coordination client, so that they outlive process 0.

The client aborts its process, and writes C++ stack traces, in the instant that its connection to process 0 breaks; no
callback of it can be set from Python. So it connects to a relay in its own process instead, which hands the bytes on to
process 0 and, when that is gone, simply stays open: then the channel has the word. It is little traffic: the topology,
addresses of peers, heartbeats; what collectives move goes elsewhere.
"""

from __future__ import annotations

import asyncio

CHUNK = 1 << 16
_held: set[asyncio.StreamWriter] = set()
"""Ends of connections whose other end is gone, kept open for as long as the process lives."""


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hold: bool = False) -> None:
    """Hands bytes on until the end; then closes the writer, unless it is to be held."""
    try:
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    if hold:
        _held.add(writer)
    else:
        writer.close()


async def to_remote(
    client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    remote: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> None:
    """Joins the client of this process with process 0, whose end the client does not get to see."""
    await asyncio.gather(_pump(client[0], remote[1]), _pump(remote[0], client[1], hold=True))


async def to_service(
    remote: tuple[asyncio.StreamReader, asyncio.StreamWriter], port: int, patience_s: float = 60.0
) -> None:
    """In process 0: joins a process's connection with the service on `port`, which may be about to start."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + patience_s
    while True:
        try:
            service = await asyncio.open_connection("127.0.0.1", port)
            break
        except OSError:
            if clock() > deadline:
                remote[1].close()
                return
            await asyncio.sleep(0.05)
    await asyncio.gather(_pump(remote[0], service[1]), _pump(service[0], remote[1]))
