"""Where this process stands among the processes of a run: from flags, or from what a scheduler put into its variables.

JAX has a detection of its own, which is not used. Under SLURM and Open MPI it hides all devices but one from every
process, also where there is one process a host; on Kubernetes it asks the API server, for which a pod needs a client
library and permissions; and it does not look at what Open MPI 5 sets.
"""

from __future__ import annotations

import dataclasses
import os
import re
import zlib
from collections.abc import Mapping

PORTS = range(61440, 65536)
"""A run's port is chosen here where nobody names one: above what Linux hands out by itself, and as JAX chooses it."""


@dataclasses.dataclass(frozen=True)
class Place:
    """One of the processes of a run.

    Attributes:
      host: where process 0 listens: a name or an address.
      port: the port that it listens on.
      processes: how many processes there are, 2 at least.
      process_id: which one this is, from 0.
      source: who says so, for people.
    """

    host: str
    port: int
    processes: int
    process_id: int
    source: str

    @property
    def coordinator(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclasses.dataclass(frozen=True)
class _Found:
    source: str
    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise ValueError(f"environment variable {name}: expected a number, found {text!r}")
    return int(text)


def _first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes: "gpu[07-09,12],x1" gives gpu07."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    first = match[0] if match else nodes
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _named(environ: Mapping[str, str]) -> _Found:
    """JAX's own variables, which Kubeflow sets too; an indexed Job of Kubernetes gives the index by itself."""
    process_id = _number(environ, "JAX_PROCESS_ID")
    if process_id is None:
        process_id = _number(environ, "JOB_COMPLETION_INDEX")
    source = "Kubernetes" if "JOB_COMPLETION_INDEX" in environ else "variables JAX_*"
    return _Found(source, environ.get("JAX_COORDINATOR_ADDRESS"), _number(environ, "JAX_NUM_PROCESSES"), process_id)


def _open_mpi(environ: Mapping[str, str]) -> _Found | None:
    """Open MPI says where process 0 is only while all are on one host; before version 5 also the launcher's address."""
    processes = _number(environ, "OMPI_COMM_WORLD_SIZE")
    if processes is None:
        return None
    launcher = environ.get("OMPI_MCA_orte_hnp_uri", "")
    run = launcher or environ.get("PMIX_NAMESPACE", "")
    address = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", launcher)
    host = None
    if _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE") == processes:
        host = "127.0.0.1"
    elif address:
        host = address[1] or f"[{address[2]}]"
    coordinator = f"{host}:{PORTS[zlib.crc32(run.encode()) % len(PORTS)]}" if host else None
    return _Found("Open MPI", coordinator, processes, _number(environ, "OMPI_COMM_WORLD_RANK"))


def _slurm(environ: Mapping[str, str]) -> _Found | None:
    """A step that `srun` started; a batch script by itself is one process, whatever the job asked for."""
    processes = _number(environ, "SLURM_STEP_NUM_TASKS")
    if processes is None:
        return None
    nodes, job = environ.get("SLURM_STEP_NODELIST"), _number(environ, "SLURM_JOB_ID")
    coordinator = f"{_first_host(nodes)}:{PORTS[job % len(PORTS)]}" if nodes and job is not None else None
    return _Found("SLURM", coordinator, processes, _number(environ, "SLURM_PROCID"))


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of "node1:1234" or "[fe80::1]:1234".

    Raises:
      ValueError: naming the text.
    """
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%\w]+)\]|([^\s:\[\]]+)):(\d{1,5})", text)
    if match is None or not 1 <= int(match[3]) <= 65535:
        raise ValueError(f"coordinator {text!r}: expected HOST:PORT with a port from 1 to 65535")
    return match[1] or match[2], int(match[3])


def find_place(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Place | None:
    """This process's place; what is not given is looked for in the environment.

    Args:
      coordinator: "HOST:PORT" of process 0.
      processes: how many there are; 1 says that this process is alone, whatever the environment says.
      process_id: from 0.
      environ: with `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID` (or `JOB_COMPLETION_INDEX`), else
        the variables of Open MPI's mpirun, else of SLURM's srun.

    Returns:
      None for a process that is alone: nothing asks for more than one.

    Raises:
      ValueError: if something asks for several processes and something else is missing or wrong.
    """
    if processes == 1 and not process_id:
        return None
    named = _named(environ)
    launcher = _open_mpi(environ) or _slurm(environ) or _Found("")
    given = _Found("flags", coordinator, processes, process_id)
    if given == _Found("flags") and (named.processes or launcher.processes or 1) == 1:
        return None
    sources: list[str] = []
    values: dict[str, str | int] = {}
    for name in ("coordinator", "processes", "process_id"):
        for found in (given, named, launcher):
            value = getattr(found, name)
            if value is not None:
                values[name] = value
                sources += [found.source] if found.source not in sources else []
                break
    flags = {"coordinator": "--coordinator", "processes": "--processes", "process_id": "--process-id"}
    missing = [flag for name, flag in flags.items() if name not in values]
    if missing:
        have = ", ".join(f"{flags[name]} {value}" for name, value in values.items())
        raise ValueError(
            f"{have}: expected {' and '.join(missing)} too, found neither the flag nor variables of a scheduler"
        )
    count, index = int(values["processes"]), int(values["process_id"])
    if count < 1:
        raise ValueError(f"--processes {count}: expected 1 or more")
    if not 0 <= index < count:
        raise ValueError(f"--process-id {index}: expected 0 to {count - 1}, for --processes {count}")
    host, port = parse_address(str(values["coordinator"]))
    return None if count == 1 else Place(host, port, count, index, " and ".join(sources))
