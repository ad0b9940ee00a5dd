"""The end of the channel that every process but 0 has."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from sharding import relay
from sharding.channel import (
    LINE_BYTES,
    ROUND_TRIP_S,
    SILENT_PINGS,
    Channel,
    ChannelError,
    Streams,
    receive,
    send,
    tune,
)
from sharding.cluster import Place


class Member(Channel):
    """See `Channel`."""

    def __init__(self, place: Place, host: str, on_end: Callable[[str], None]) -> None:
        super().__init__(place, host, on_end)
        self._hub: Streams
        self._hub_name = self.name(0, place.host)
        self._token = ""
        self._silent_pings = 0
        self._answers: asyncio.Queue[str | None] = asyncio.Queue()

    async def _connect(self, timeout_s: float) -> Streams:
        """A connection to process 0, which may still be about to start."""
        host, port = self.place.host, self.place.port
        deadline = self._loop.time() + timeout_s
        why = "no answer"
        while (left := deadline - self._loop.time()) > 0:
            try:
                return await asyncio.wait_for(
                    asyncio.open_connection(host, port, limit=LINE_BYTES), min(left, ROUND_TRIP_S)
                )
            except TimeoutError:
                why = "no answer"
            except OSError as e:
                why = "connection refused" if isinstance(e, ConnectionRefusedError) else e.strerror or str(e)
            await asyncio.sleep(min(0.2, max(left, 0)))
        where = f"coordinator {self.place.coordinator}"
        raise ChannelError(f"{where}: expected process 0 there within {timeout_s:g} s, found nobody ({why})")

    async def come(self, timeout_s: float) -> None:
        start = self._loop.time()
        self._hub = await self._connect(timeout_s)
        reader, writer = self._hub
        self._resources.append(writer)
        tune(writer)
        send(writer, process=self.place.process_id, processes=self.place.processes, host=self.host)
        welcome = asyncio.ensure_future(receive(reader))
        done, _ = await asyncio.wait([welcome], timeout=max(start + timeout_s - self._loop.time(), 0))
        if not done:  # process 0 knows who is missing
            send(writer, late=timeout_s)
            done, _ = await asyncio.wait([welcome], timeout=ROUND_TRIP_S)
        answer = welcome.result() if done else None
        if answer is not None and "stop" in answer:
            raise ChannelError(answer["stop"])
        if answer is None or "go" not in answer:
            where = f"coordinator {self.place.coordinator}"
            found = "something that does not answer" if not done else "something else, or process 0 ended"
            raise ChannelError(f"{where}: expected process 0 of this run there, found {found}")
        self._token, self._hub_name = answer["go"], self.name(0, answer["host"])
        self.spawn(self._listen(reader))

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while (message := await receive(reader)) is not None:
            self._silent_pings = 0
            self._hear(message)
        self.end(f"{self._hub_name} is gone: stopping")

    def _hear(self, message: dict[str, Any]) -> None:
        if "stop" in message:
            self.end(message["stop"])
        elif "compared" in message:
            if message["compared"] is not None:
                self.over.set()
            self._answers.put_nowait(message["compared"])
        elif "over" in message:
            self.over.set()

    def ping(self) -> None:
        self._silent_pings += 1
        send(self._hub[1], ping=1)
        if self._silent_pings > SILENT_PINGS:
            self.end(f"{self._hub_name} does not answer: stopping")

    def tell_end(self, text: str) -> None:
        """Process 0 knows, or is gone."""

    async def compare(self, facts: Mapping[str, str], timeout_s: float) -> str | None:
        send(self._hub[1], facts=dict(facts))
        try:
            return await asyncio.wait_for(self._answers.get(), timeout_s + ROUND_TRIP_S)
        except TimeoutError:
            return f"{self._hub_name} has not said within {timeout_s:g} s what it was started with"

    async def fail(self, line: str) -> None:
        self.over.set()
        send(self._hub[1], failed=line)
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(self._hub[1].drain(), ROUND_TRIP_S)

    async def finish(self) -> None:
        send(self._hub[1], finished=True)
        await self.over.wait()

    async def leave(self) -> None:
        await self.close()

    async def relay(self) -> int:
        """Starts a relay to JAX's coordination service in process 0.

        Returns:
          the port of this host, on the loopback, that it listens on.
        """
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self._resources.append(server)
        port: int = server.sockets[0].getsockname()[1]
        return port

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            remote = await asyncio.open_connection(self.place.host, self.place.port)
        except OSError:
            await asyncio.Event().wait()  # process 0 is gone; the channel says so
            return
        send(remote[1], relay=self._token)
        await relay.to_remote((reader, writer), remote)
