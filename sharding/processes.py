"""Many processes as one run: they start together, agree, speak with one voice, and end together.

`jax.distributed` is the engine. Around it is a channel of our own (`sharding.channel`), for what the engine lacks: who
did not come, who differs, and who is gone, each in one line and soon. Left to itself JAX (0.10) notices a dead process
by heartbeats, after which every process aborts with signal 6 and C++ stack traces; a process that never comes or a
coordinator that is not there ends the same way.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Coroutine, Mapping
from importlib.metadata import version
from typing import Any, NoReturn, TypeVar

import jax

from sharding.channel import ROUND_TRIP_S, Channel, ChannelError
from sharding.cluster import Place
from sharding.hub import Hub
from sharding.member import Member

T = TypeVar("T")

FAILED = 2
"""Exit status of a process that ends because another one did, as for bad input or environment."""
START_S = 60.0
ECHO_S = 3.0
"""How long an error of the runtime waits for news that another process is gone, of which it may be the echo."""
JAX_PATIENCE_S = 600
"""JAX's own limits are out of the way of the channel's, which are shorter."""


class Group:
    """The processes of one run, seen from one of them. Made by `start`."""

    def __init__(self, place: Place, program: str) -> None:
        self.place = place
        self._program = program
        self._last_word = threading.Lock()  # taken once, by who ends this process, and never given back
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="channel", daemon=True).start()
        self._channel: Channel

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _open(self, timeout_s: float) -> tuple[str, str | None]:
        """Meets the others; then the address that JAX's client is told, and in process 0 the service's."""
        host = socket.gethostname()

        async def first() -> tuple[str, str | None]:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
            self._channel = Hub(self.place, host, self._end, port)
            await self._channel.gather(timeout_s)
            return f"127.0.0.1:{port}", f"127.0.0.1:{port}"

        async def other() -> tuple[str, str | None]:
            self._channel = member = Member(self.place, host, self._end)
            await member.gather(timeout_s)
            return f"127.0.0.1:{await member.relay()}", None

        return self._run(first() if self.place.process_id == 0 else other())

    def _end(self, text: str) -> None:
        """Ends this process, which may sit in a collective that will never return, from the channel's thread."""
        if self._last_word.acquire(blocking=False):
            self._exit(f"{self._program}: {text}", FAILED)

    def _exit(self, shown: str, status: int) -> NoReturn:
        # Not sys.exit: JAX would wait at exit for processes that are gone. Whatever holds standard error or its
        # descriptor up must not hold up the end.
        guard = threading.Timer(ROUND_TRIP_S, os._exit, (status,))
        guard.daemon = True
        guard.start()
        if shown:
            os.write(2, (shown.rstrip("\n") + "\n").encode(errors="replace"))
        os._exit(status)

    def agree(self, facts: Mapping[str, str], timeout_s: float = START_S) -> None:
        """Compares what the processes were started with. All call it, in the same order as their other calls.

        Args:
          facts: name and value of whatever must be equal everywhere.
          timeout_s: how long to wait for a process that has not called it.

        Raises:
          ChannelError: on every process, naming the fact, the process that differs from process 0, and both values.
        """
        problem = self._run(self._channel.compare(facts, timeout_s))
        if problem is not None:
            raise ChannelError(problem)

    def fail(self, line: str, status: int = FAILED, shown: str | None = None) -> NoReturn:
        """Ends this process for a reason of its own, and thereby all others, which say so.

        Args:
          line: the reason, which the others show.
          status: this process's exit status; the others' is 2.
          shown: what is written to standard error here; by default the line, after the program's name.
        """
        self._last_word.acquire()  # if the channel has it, this process ends here
        try:
            self._run(self._channel.fail(" ".join(line.split())[:500]))
        finally:
            self._exit(f"{self._program}: {line}" if shown is None else shown, status)

    def crash(self, line: str, shown: str) -> NoReturn:
        """Like `fail`, with status 1, for an error that may be the echo of another process's end.

        A collective fails at once where its peer died; if that is it, the channel has the better word in a moment.
        """
        threading.Event().wait(ECHO_S)
        self.fail(line, 1, shown)

    def finish(self) -> None:
        """Waits until all processes are done, and lets go of JAX's coordination. The last call.

        A process that ends before it has called this is taken for gone.
        """
        self._run(self._channel.finish())
        jax.distributed.shutdown()
        self._run(self._channel.leave())


def start(place: Place, timeout_s: float = START_S, program: str = "dsjax") -> Group:
    """Makes this process one of several, before any device is touched.

    From here until `Group.finish`, if another process dies, this one ends with status 2 and one line on standard error,
    wherever it is.

    Args:
      place: from `sharding.cluster.find_place`.
      timeout_s: for all processes to come.
      program: what lines on standard error begin with.

    Raises:
      ChannelError: a process or the coordinator is not there in time; processes do not fit together; versions differ.
    """
    group = Group(place, program)
    address, bind = group._open(timeout_s)
    versions = {"jax": jax.__version__, "jaxlib": version("jaxlib"), "python": sys.version.split()[0]}
    group.agree(versions, timeout_s)
    # The service and all that connects to it are on the loopback here, which no proxy must see.
    os.environ["no_grpc_proxy"] = "127.0.0.1"  # noqa: SIM112 - that is its name
    jax.config.update("jax_check_proxy_envs", False)
    jax.config.update("jax_enable_preemption_service", False)  # it writes C++ logs when the coordinator is gone
    jax.distributed.initialize(
        address,
        place.processes,
        place.process_id,
        cluster_detection_method="deactivate",
        initialization_timeout=JAX_PATIENCE_S,
        heartbeat_timeout_seconds=JAX_PATIENCE_S,
        shutdown_timeout_seconds=10,
        coordinator_bind_address=bind,
    )
    return group


def guard_stdout(speaks: bool) -> None:
    """Makes standard output ours alone, at the level of the descriptor, to which libraries (gloo) write by themselves.

    Args:
      speaks: whether what Python prints is wanted. If so, what anything else writes goes to standard error; if not,
        everything goes nowhere.
    """
    sys.stdout.flush()
    if speaks:
        ours = os.dup(1)
        os.dup2(2, 1)
    else:
        ours = os.open(os.devnull, os.O_WRONLY)
        os.dup2(ours, 1)
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    sys.stdout = os.fdopen(ours, "w", buffering=1 if os.isatty(ours) else -1, encoding=encoding, errors=errors)
