"""The channel between the processes of a run: who has come, whether all agree, who is gone.

Process 0 (the hub) listens at the coordinator's address, and every other process (a member) keeps one connection to it,
on which lines of JSON go both ways. When a process dies, however it dies, the kernel closes its connections at once:
that, not a heartbeat, is how the others know. Two slower nets are below it. The kernel gives a connection up when what
was sent has not been acknowledged for 15 s, so a host that vanishes is noticed; and every process says something every
5 s, so one that stands still although its host is well is noticed too, after 45 s.

Everything here runs in one event loop in a thread of its own (see `sharding.processes`), which goes on while the main
thread sits in compiled code or in a collective.
"""

from __future__ import annotations

import asyncio
import json
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from sharding.cluster import Place

PING_S = 5.0
SILENT_PINGS = 9
UNACKNOWLEDGED_MS = 15_000
LINE_BYTES = 1 << 20
LINGER_S = 0.3
"""How long a process outlives its last word, so that it arrives before the end of the connection does."""
ROUND_TRIP_S = 5.0


class ChannelError(ValueError):
    """The processes cannot run together; the message is one line for the user."""


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def receive(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """One message; None at the end of the connection, and for what is no message."""
    try:
        message = json.loads(await reader.readline())
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None


def send(writer: asyncio.StreamWriter, **message: Any) -> None:
    """One message, unless the connection is closed."""
    if not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\n")


def tune(writer: asyncio.StreamWriter) -> None:
    """Makes the kernel notice a host that is gone."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux; elsewhere the pings are the only net
    if option is not None:
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, option, UNACKNOWLEDGED_MS)


class Channel(ABC):
    """One process's end of it. All methods run in the event loop."""

    def __init__(self, place: Place, host: str, on_end: Callable[[str], None]) -> None:
        """
        Args:
          place: of this process.
          host: what this process's host is called.
          on_end: called once with a line that says who is gone, if that happens after `gather` and before `finish`.
        """
        self.place, self.host = place, host
        self.over = asyncio.Event()
        """Set when nobody's end is news any more."""
        self._loop = asyncio.get_running_loop()
        self._verdict: asyncio.Future[str] = self._loop.create_future()
        self._on_end = on_end
        self._watching = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._resources: list[asyncio.Server | asyncio.StreamWriter] = []

    def name(self, process: int, host: str) -> str:
        return f"process {process} of {self.place.processes} ({host})"

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Runs it beside; the loop itself holds tasks only weakly."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def end(self, text: str) -> None:
        """The run is over for a bad reason; the first one counts."""
        if self._verdict.done() or self.over.is_set():
            return
        self._verdict.set_result(text)
        self.tell_end(text)
        if self._watching:
            self._loop.call_later(LINGER_S, self._on_end, text)

    async def gather(self, timeout_s: float) -> None:
        """Returns once all processes have come.

        Raises:
          ChannelError: if not all come in time, or do not fit together.
        """
        coming = asyncio.ensure_future(self.come(timeout_s))
        either: list[asyncio.Future[Any]] = [coming, self._verdict]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._verdict.done():
            coming.cancel()
            await asyncio.sleep(LINGER_S)
            raise ChannelError(self._verdict.result())
        await coming
        self._watching = True
        self.spawn(self._ping())

    async def _ping(self) -> None:
        # Silence is counted in pings of our own, so a process whose own loop stood still blames nobody.
        while True:
            await asyncio.sleep(PING_S)
            self.ping()

    @abstractmethod
    async def come(self, timeout_s: float) -> None:
        """Meets the other processes."""

    @abstractmethod
    def ping(self) -> None:
        """Says something to the other side, and calls `end` if that has been silent for too long."""

    @abstractmethod
    def tell_end(self, text: str) -> None:
        """Passes the reason of the end on."""

    @abstractmethod
    async def compare(self, facts: Mapping[str, str], timeout_s: float) -> str | None:
        """The first difference between the processes' facts, None if there is none; the same answer everywhere."""

    @abstractmethod
    async def fail(self, line: str) -> None:
        """Says that this process ends with an error of its own."""

    @abstractmethod
    async def finish(self) -> None:
        """Returns once all processes have called this; from then on their ends are no news."""

    @abstractmethod
    async def leave(self) -> None:
        """After `finish`: returns when no other process needs this one any more."""

    async def close(self) -> None:
        """Lets go of connections, servers and tasks; nobody's end is news any more."""
        self.over.set()
        for task in list(self._tasks):
            task.cancel()
        for resource in self._resources:
            resource.close()
            await resource.wait_closed()
