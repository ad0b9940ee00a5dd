"""Process 0's end of the channel: it meets the members, compares what they say, and passes on who is gone."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import reprlib
import secrets
import socket
from collections.abc import Callable, Mapping
from typing import Any

from sharding import relay
from sharding.channel import (
    LINE_BYTES,
    LINGER_S,
    ROUND_TRIP_S,
    SILENT_PINGS,
    Channel,
    ChannelError,
    receive,
    send,
    tune,
)
from sharding.cluster import Place

_SHORT = reprlib.Repr()
_SHORT.maxstring = 100


@dataclasses.dataclass
class _Member:
    name: str
    writer: asyncio.StreamWriter
    silent_pings: int = 0
    finished: bool = False
    facts: list[dict[str, str]] = dataclasses.field(default_factory=list)  # one for each `compare`


def _difference(facts: Mapping[str, Mapping[str, str]]) -> str | None:
    """How the first process that differs from the first of all does."""
    names = list(facts)
    first = facts[names[0]]
    for name in names[1:]:
        other = facts[name]
        for fact in sorted(first.keys() | other.keys()):
            if other.get(fact) != first.get(fact):
                expected, found = (_SHORT.repr(f[fact]) if fact in f else "nothing" for f in (first, other))
                return f"{fact}: expected {expected}, as {names[0]} has it, found {found} on {name}"
    return None


class Hub(Channel):
    """See `Channel`."""

    def __init__(self, place: Place, host: str, on_end: Callable[[str], None], service_port: int) -> None:
        """
        Args:
          place, host, on_end: see `Channel`.
          service_port: where on this host JAX's coordination service listens, or will soon.
        """
        super().__init__(place, host, on_end)
        self._service_port = service_port
        self._token = secrets.token_hex(16)
        self._members: dict[int, _Member] = {}
        self._news = asyncio.Event()
        self._finished = False
        self._compared = 0

    def _listen(self) -> socket.socket:
        """On all of this host's addresses, unless the coordinator's is the loopback's."""
        host, port = self.place.host, self.place.port
        try:
            if host in ("localhost", "127.0.0.1", "::1"):
                family = socket.AF_INET6 if host == "::1" else socket.AF_INET
                return socket.create_server(("127.0.0.1" if host == "localhost" else host, port), family=family)
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            return socket.create_server(("", port))
        except OSError as e:
            where = f"coordinator {self.place.coordinator}"
            raise ChannelError(f"{where}: process 0 cannot listen on port {port}: {e.strerror or e}") from None

    async def come(self, timeout_s: float) -> None:
        self._resources.append(await asyncio.start_server(self._welcome, sock=self._listen(), limit=LINE_BYTES))
        everybody = self._until(lambda: len(self._members) == self.place.processes - 1)
        try:
            await asyncio.wait_for(everybody, timeout_s)
        except TimeoutError:
            self._late(timeout_s)
            return
        for member in self._members.values():
            send(member.writer, go=self._token, host=self.host)

    def _late(self, timeout_s: float) -> None:
        missing = [str(i) for i in range(1, self.place.processes) if i not in self._members]
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        which = f"process {shown} of {self.place.processes}" if len(missing) == 1 else f"processes {shown}"
        self.end(f"coordinator {self.place.coordinator}: {which} did not come within {timeout_s:g} s")

    async def _until(self, true: Callable[[], bool]) -> None:
        while not true():
            await self._news.wait()
            self._news.clear()

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection: a member's, a member's relay's, or a stranger's, who is sent away."""
        hello = None
        with contextlib.suppress(TimeoutError):
            hello = await asyncio.wait_for(receive(reader), ROUND_TRIP_S)
        if hello is not None and hello.get("relay") == self._token:
            await relay.to_service((reader, writer), self._service_port)
        elif hello is not None and isinstance(hello.get("process"), int):
            await self._serve(hello, reader, writer)
        writer.close()

    async def _serve(self, hello: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._verdict.done():
            send(writer, stop=self._verdict.result())
            return
        process, count = hello["process"], hello.get("processes")
        name = self.name(process, str(hello.get("host")))
        problem = None
        if count != self.place.processes:
            problem = f"--processes: expected {self.place.processes}, as process 0 has it, found {count} on {name}"
        elif not 0 < process < self.place.processes or process in self._members:
            there = self._members[process].name if process in self._members else self.name(0, self.host)
            problem = f"--process-id {process}: expected one process with it, found {there} and {name}"
        if problem is not None:
            self.end(problem)
            send(writer, stop=problem)
            return
        tune(writer)
        member = self._members[process] = _Member(name, writer)
        self._resources.append(writer)
        self._news.set()
        while (message := await receive(reader)) is not None:
            member.silent_pings = 0
            self._hear(member, message)
        self.end(f"{name} is gone: stopping")

    def _hear(self, member: _Member, message: dict[str, Any]) -> None:
        if "facts" in message:
            member.facts.append(message["facts"])
        elif "failed" in message:
            self.end(f"{member.name} has stopped: {message['failed']}")
        elif "late" in message and not self._watching:
            self._late(message["late"])
        elif "finished" in message:
            member.finished = True
        self._news.set()

    def ping(self) -> None:
        for member in self._members.values():
            member.silent_pings += 1
            send(member.writer, ping=1)
            if member.silent_pings > SILENT_PINGS:
                self.end(f"{member.name} does not answer: stopping")

    def tell_end(self, text: str) -> None:
        for member in self._members.values():
            send(member.writer, stop=text)

    async def compare(self, facts: Mapping[str, str], timeout_s: float) -> str | None:
        index, self._compared = self._compared, self._compared + 1
        everybody = self._until(lambda: all(len(m.facts) > index for m in self._members.values()))
        try:
            await asyncio.wait_for(everybody, timeout_s)
            members = {self._members[i].name: self._members[i].facts[index] for i in sorted(self._members)}
            answer = _difference({self.name(0, self.host): facts} | members)
        except TimeoutError:
            late = next(m.name for m in self._members.values() if len(m.facts) <= index)
            answer = f"{late} has not said within {timeout_s:g} s what it was started with"
        if answer is not None:
            self.over.set()
        for member in self._members.values():
            send(member.writer, compared=answer)
        return answer

    async def fail(self, line: str) -> None:
        self.over.set()
        self.tell_end(f"{self.name(0, self.host)} has stopped: {line}")
        await asyncio.sleep(LINGER_S)

    async def finish(self) -> None:
        await self._until(lambda: all(m.finished for m in self._members.values()))
        self.over.set()
        for member in self._members.values():
            send(member.writer, over=True)

    async def leave(self) -> None:
        deadline = self._loop.time() + ROUND_TRIP_S
        while self._loop.time() < deadline and not all(m.writer.is_closing() for m in self._members.values()):
            await asyncio.sleep(0.01)
        await self.close()
