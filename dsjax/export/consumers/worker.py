"""A consumer's work in a process of its own: a compiler that aborts then costs one line, not the command.

The two talk through a folder, which holds the request, then the answer.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsjax.export.consumers.base import Arrays, Refused
from dsjax.export.consumers.exchange import read_arrays, write_arrays

Task = Callable[[list[bytes], list[Arrays], dict[str, Any]], tuple[list[Arrays], dict[str, Any]]]
"""Modules, arguments of each, options -> results of each, and facts for JSON."""

_CALL = f"import sys, pathlib, {__name__} as worker; worker.serve(pathlib.Path(sys.argv[1]))"


def isolated(
    task: str,
    modules: Sequence[bytes],
    arguments: Sequence[Arrays] = (),
    *,
    options: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    time_limit: float = 600.0,
) -> tuple[list[Arrays], dict[str, Any]]:
    """Calls a `Task` in a new process.

    Args:
      task: "module:function".
      modules, arguments, options: of the task.
      environment: variables on top of this process's.
      time_limit: seconds after which the process is ended, and whatever it has started.

    Raises:
      Refused: with the task's own reason, with the last word of a process that died, or for too long a time.
    """
    with tempfile.TemporaryDirectory(prefix="dsjax-verify-") as name:
        folder = Path(name)
        request = {"task": task, "modules": len(modules), "arguments": len(arguments), "options": dict(options or {})}
        (folder / "request.json").write_text(json.dumps(request))
        for i, module in enumerate(modules):
            (folder / f"module{i}").write_bytes(module)
        for i, arrays in enumerate(arguments):
            write_arrays(folder / f"arguments{i}", arrays)
        with (folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CALL, name],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env=_environment(environment),
                start_new_session=True,
            )
            try:
                status = process.wait(time_limit)
            except BaseException as e:
                os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it has started
                process.wait()
                if isinstance(e, subprocess.TimeoutExpired):
                    raise Refused(f"not done within --time-limit {time_limit:g} s", "too slow") from None
                raise
        said = (folder / "stderr").read_text(errors="replace")
        if (folder / "refused").exists():
            raise Refused(_with_diagnostic((folder / "refused").read_text(), said))
        if status != 0 or not (folder / "answer.json").exists():
            raise Refused(f"its process ended with {_status(status)}: {_last_word(said)}")
        answer = json.loads((folder / "answer.json").read_text())
        return [read_arrays(folder / f"results{i}") for i in range(answer["results"])], answer["facts"]


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    """This process's, in which the same dsjax is found, with `extra`."""
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": path, **(extra or {})}


def _status(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _last_word(said: str) -> str:
    """The line that says what went wrong, among those that say where."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|fatal|assert|failed|check", line, re.IGNORECASE)]
    return (telling or lines or ["no word"])[-1][:300]


def _with_diagnostic(reason: str, said: str) -> str:
    """A reason with the first diagnostic that a compiler wrote beside it; Python is told only that something failed."""
    found = re.search(r"error: (.+)", said)
    return reason if found is None or found[1] in reason else f"{reason}: {found[1]}"


def serve(folder: Path) -> None:
    """Answers the request in a folder."""
    request = json.loads((folder / "request.json").read_text())
    module, _, function = request["task"].partition(":")
    task: Task = getattr(importlib.import_module(module), function)
    modules = [(folder / f"module{i}").read_bytes() for i in range(request["modules"])]
    arguments = [read_arrays(folder / f"arguments{i}") for i in range(request["arguments"])]
    try:
        results, facts = task(modules, arguments, request["options"])
    except Exception as e:  # a compiler's own types, by consumer and version; the parent makes one of it
        name = "" if isinstance(e, Refused) else f"{type(e).__name__}: "
        (folder / "refused").write_text(f"{name}{' '.join(str(e).split())[:400]}")
        return
    for i, arrays in enumerate(results):
        write_arrays(folder / f"results{i}", arrays)
    (folder / "answer.json").write_text(json.dumps({"results": len(results), "facts": facts}))
