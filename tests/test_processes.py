"""Many processes: found, met, compared, watched; on one machine, over gloo."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import yaml  # flax needs it

from dsjax.cli.main import build_parser
from dsjax.cli.many import facts_of
from sharding import channel
from sharding.channel import Channel, ChannelError
from sharding.cluster import PORTS, Place, find_place
from sharding.hub import Hub
from sharding.member import Member

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).with_name("process_program.py")
LIMIT_S = 40

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],x1",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
KUBERNETES = {"JAX_COORDINATOR_ADDRESS": "job-0.net:8476", "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


# --- Where a process stands ---


def test_slurm() -> None:
    """A step's tasks; the first host of the list; a port that depends on the job."""
    assert find_place(environ=SLURM) == Place("gpu07", PORTS[1], 16, 5, "SLURM")


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("r[3-4]n[1,5]", "r3n1"), ("a[12],b", "a12"), ("gpu-a-[001-015]", "gpu-a-001")],
)
def test_slurm_node_lists(nodes: str, host: str) -> None:
    place = find_place(environ=SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert place is not None and place.host == host


def test_a_batch_script_is_one_process() -> None:
    """Outside of `srun` SLURM's job has many tasks, but its script is one process."""
    batch = {"SLURM_JOB_ID": "4097", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "gpu[07-09]"}
    assert find_place(environ=batch) is None


def test_open_mpi() -> None:
    """On one host process 0 is on it; over several version 4 says where the launcher is, and version 5 nothing."""
    place = find_place(environ=OPEN_MPI | {"PMIX_NAMESPACE": "prterun-node1-123@1"})
    assert place is not None and (place.host, place.processes, place.process_id) == ("127.0.0.1", 4, 3)
    two_hosts = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    uri = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
    place = find_place(environ=two_hosts | uri)
    assert place is not None and place.host == "10.96.0.1"
    with pytest.raises(ValueError, match="expected --coordinator too"):
        find_place(environ=two_hosts)
    assert find_place("10.0.0.9:99", environ=two_hosts) == Place("10.0.0.9", 99, 4, 3, "flags and Open MPI")


def test_kubernetes() -> None:
    """The manifest's variables and the index that an indexed Job has; an indexed Job without them is not ours."""
    assert find_place(environ=KUBERNETES) == Place("job-0.net", 8476, 2, 1, "Kubernetes")
    assert find_place(environ={"JOB_COMPLETION_INDEX": "1"}) is None


def test_flags_come_first() -> None:
    """Each flag replaces what the environment says, and --processes 1 all of it."""
    assert find_place(processes=1, environ=SLURM) is None
    assert find_place("[fe80::1]:7", 3, 2, SLURM) == Place("fe80::1", 7, 3, 2, "flags")
    assert find_place(environ={}) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("h:1", None, None), "--coordinator h:1: expected --processes and --process-id too"),
        ((None, 4, 2), "--processes 4, --process-id 2: expected --coordinator too"),
        ((None, None, 0), "--process-id 0: expected --coordinator and --processes too"),
        (("h:1", 2, 2), "--process-id 2: expected 0 to 1"),
        (("h:1", 2, -1), "--process-id -1: expected 0 to 1"),
        (("h:1", 0, 0), "--processes 0: expected 1 or more"),
        (("h", 2, 0), "coordinator 'h': expected HOST:PORT"),
        (("h:0", 2, 0), "coordinator 'h:0': expected HOST:PORT"),
        (("h:65536", 2, 0), "coordinator 'h:65536': expected HOST:PORT"),
        (("fe80::1:5", 2, 0), "expected HOST:PORT"),
    ],
)
def test_wrong_flags(flags: tuple[str | None, int | None, int | None], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        find_place(*flags, environ={})


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(ValueError, match="SLURM_PROCID: expected a number, found 'x'"):
        find_place(environ=SLURM | {"SLURM_PROCID": "x"})


# --- The channel by itself, without JAX ---


def ends() -> tuple[list[str], Callable[[str], None]]:
    heard: list[str] = []
    return heard, heard.append


@contextlib.asynccontextmanager
async def channels(count: int) -> AsyncIterator[tuple[list[Channel], list[str]]]:
    """All ends of a channel in one event loop, together, and what they call out."""
    port, (heard, on_end) = free_port(), ends()
    places = [Place("127.0.0.1", port, count, i, "") for i in range(count)]
    made: list[Channel] = [Hub(places[0], "a", on_end, free_port())]
    made += [Member(place, f"b{place.process_id}", on_end) for place in places[1:]]
    await asyncio.gather(*(end.gather(10) for end in made))
    yield made, heard
    await close(*made)


async def close(*closed: Channel | asyncio.StreamWriter) -> None:
    for end in closed:
        if isinstance(end, asyncio.StreamWriter):
            end.close()
            await end.wait_closed()
        else:
            await end.close()
    await asyncio.sleep(0.05)  # what their ends wake up


def test_agreement() -> None:
    """Equal facts agree; of different ones all hear the same: the fact, who differs, and both values."""

    async def run() -> None:
        async with channels(3) as (made, heard):
            assert await asyncio.gather(*(end.compare({"x": "1"}, 10) for end in made)) == [None] * 3
            facts = [{"x": "1", "y": "2"}, {"x": "1", "y": "2"}, {"x": "3"}]
            answers = await asyncio.gather(*(end.compare(f, 10) for end, f in zip(made, facts, strict=True)))
        expected = "x: expected '1', as process 0 of 3 (a) has it, found '3' on process 2 of 3 (b2)"
        assert answers == [expected] * 3
        assert heard == []

    asyncio.run(run())


def test_agreement_is_bounded() -> None:
    """A process that does not answer is named."""

    async def run() -> None:
        async with channels(3) as (made, _):
            answers = await asyncio.gather(made[0].compare({}, 0.2), made[2].compare({}, 0.2))
        assert answers == ["process 1 of 3 (b1) has not said within 0.2 s what it was started with"] * 2

    asyncio.run(run())


def test_silence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is there and says nothing, also none of its pings; a stranger at the port is no process."""
    monkeypatch.setattr(channel, "PING_S", 0.05)
    port, (heard, on_end) = free_port(), ends()

    async def run() -> None:
        hub = Hub(Place("127.0.0.1", port, 2, 0, ""), "a", on_end, free_port())
        meeting = asyncio.create_task(hub.gather(10))
        await asyncio.sleep(0.1)
        _, stranger = await asyncio.open_connection("127.0.0.1", port)
        stranger.write(b"GET / HTTP/1.1\r\n")
        await asyncio.sleep(0.1)
        assert not meeting.done()
        _, silent = await asyncio.open_connection("127.0.0.1", port)
        silent.write(b'{"process": 1, "processes": 2, "host": "b"}\n')
        await meeting
        start = time.monotonic()
        while not heard and time.monotonic() - start < 10:
            await asyncio.sleep(0.05)
        await close(stranger, silent, hub)

    asyncio.run(run())
    assert heard == ["process 1 of 2 (b) does not answer: stopping"]


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        ({"process": 1, "processes": 3}, "--processes: expected 2, as process 0 has it, found 3 on process 1 of 2"),
        ({"process": 0, "processes": 2}, "--process-id 0: expected one process with it"),
        ({"process": 9, "processes": 2}, "--process-id 9: expected one process with it"),
    ],
)
def test_processes_that_do_not_fit(hello: dict[str, int], message: str) -> None:
    """The newcomer and process 0 both hear why."""
    port, (_, on_end) = free_port(), ends()

    async def run() -> None:
        hub = Hub(Place("127.0.0.1", port, 2, 0, ""), "a", on_end, free_port())
        meeting = asyncio.create_task(hub.gather(10))
        await asyncio.sleep(0.1)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        channel.send(writer, **hello, host="b")
        answer = await channel.receive(reader)
        assert answer is not None and message in answer["stop"]
        with pytest.raises(ChannelError, match=message):
            await meeting
        await close(writer, hub)

    asyncio.run(run())


def test_a_port_in_use() -> None:
    """As with a second process 0."""

    async def run(port: int) -> None:
        with pytest.raises(ChannelError, match=f"process 0 cannot listen on port {port}: Address already in use"):
            await Hub(Place("127.0.0.1", port, 2, 0, ""), "a", lambda _: None, 1).gather(1)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        asyncio.run(run(taken.getsockname()[1]))


# --- Processes ---


class Run:
    """Some of the processes of one run of the program."""

    def __init__(self, folder: Path, count: int, mode: str, *, timeout_s: float = 30, absent: int = -1) -> None:
        self.folder, self.coordinator = folder, f"127.0.0.1:{free_port()}"
        environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
        environ.pop("XLA_FLAGS", None)
        self.processes = {
            i: subprocess.Popen(
                [sys.executable, str(PROGRAM), self.coordinator, str(count), str(i), str(timeout_s), mode, str(folder)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environ,
                text=True,
            )
            for i in range(count)
            if i != absent
        }

    def wait_ready(self) -> None:
        start = time.monotonic()
        while not all((self.folder / f"ready-{i}").exists() for i in self.processes):
            assert time.monotonic() - start < LIMIT_S
            time.sleep(0.02)

    def results(self) -> dict[int, tuple[int, str, list[str]]]:
        """Status, standard output, and the lines of standard error but gloo's, of each process."""
        found = {}
        for i, process in self.processes.items():
            out, err = process.communicate(timeout=LIMIT_S)
            found[i] = (process.returncode, out, [line for line in err.splitlines() if not line.startswith("[Gloo]")])
        return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts a run of the program; whatever is left of it is killed."""
    runs: list[Run] = []

    def make(count: int, mode: str, *, timeout_s: float = 30, absent: int = -1) -> Run:
        runs.append(Run(tmp_path, count, mode, timeout_s=timeout_s, absent=absent))
        return runs[-1]

    yield make
    for run in runs:
        for process in run.processes.values():
            process.kill()
            process.communicate()


Start = Callable[..., Run]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_add_up(start: Start, count: int) -> None:
    """All devices take part; process 0 alone prints, and nothing but its line; a slow process is waited for."""
    results = start(count, "slow-last").results()
    assert {i: status for i, (status, _, _) in results.items()} == dict.fromkeys(range(count), 0)
    assert json.loads(results[0][1]) == {"total": 2 * count, "devices": 2 * count}
    assert results[0][1].count("\n") == 1
    assert all(out == "" for i, (_, out, _) in results.items() if i)
    assert all(err == [] for _, _, err in results.values())


def test_processes_that_differ(start: Start) -> None:
    """All end, with one and the same line."""
    results = start(2, "differ").results()
    first, other = (f"process {i} of 2 ({socket.gethostname()})" for i in range(2))
    line = f"program: --dtype: expected 'bfloat16', as {first} has it, found 'float32' on {other}"
    assert all(r == (2, "", [line]) for r in results.values()), results


def test_a_coordinator_that_is_not_there(start: Start) -> None:
    run = start(2, "", timeout_s=1, absent=0)
    expected = f"coordinator {run.coordinator}: expected process 0 there within 1 s, found nobody (connection refused)"
    assert run.results() == {1: (2, "", [f"program: {expected}"])}


def test_a_process_that_never_comes(start: Start) -> None:
    """Those that came end together, and say which did not."""
    run = start(3, "", timeout_s=6, absent=2)
    line = f"program: coordinator {run.coordinator}: process 2 of 3 did not come within 6 s"
    assert run.results() == dict.fromkeys((0, 1), (2, "", [line]))


@pytest.mark.parametrize(("count", "mode", "victim"), [(3, "collectives", 1), (3, "collectives", 0), (2, "compute", 1)])
def test_a_process_is_killed(start: Start, count: int, mode: str, victim: int) -> None:
    """In a collective, or while the others compute; also process 0, where JAX's own service is. All others end soon,
    with status 2 and one line; nothing of JAX's own abort is seen."""
    run = start(count, mode)
    run.wait_ready()
    run.processes[victim].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    results = run.results()
    assert time.monotonic() - begin < 15
    assert results.pop(victim)[0] == -signal.SIGKILL
    line = f"program: process {victim} of {count} ({socket.gethostname()}) is gone: stopping"
    assert all(r == (2, "", [line]) for r in results.values()), results


def test_a_process_ends_with_its_own_error(start: Start) -> None:
    """It says why; so do the others, which do not wait for it."""
    results = start(2, "input-error").results()
    error = "prompts.jsonl: line 3: expected JSON"
    assert results[1] == (2, "", [f"program: {error}"])
    line = f"program: process 1 of 2 ({socket.gethostname()}) has stopped: {error}"
    assert results[0] == (2, "", [line])


def test_a_bug_shows_its_traceback_once(start: Start) -> None:
    results = start(2, "bug").results()
    status, _, err = results[1]
    assert (status, err[0], err[-1]) == (1, "Traceback (most recent call last):", "AssertionError: a bug")
    line = f"program: process 1 of 2 ({socket.gethostname()}) has stopped: AssertionError: a bug"
    assert results[0][0] == 2 and results[0][2] == [line]


# --- The command line and the scripts ---


def test_facts(tmp_path: Path) -> None:
    """What files contain counts, not where they lie; so does every flag but outputs and those that place a process."""
    for host in ("a", "b"):
        (tmp_path / host / "model").mkdir(parents=True)
        (tmp_path / host / "model/config.json").write_text("{}")
        (tmp_path / host / "model/x.safetensors").write_bytes(b"12")
        (tmp_path / host / "ids.json").write_text("[[1, 2]]")

    def facts(host: str, *flags: str) -> dict[str, str]:
        folder = tmp_path / host
        command = ["score", "--model", f"{folder}/model", "--tokens", f"{folder}/ids.json", "--logits", f"{folder}/out"]
        place = ["--coordinator", "h:1", "--processes", "2", "--process-id", str("ab".index(host))]
        return facts_of(build_parser().parse_args([*command, *place, *flags]))

    def different() -> set[str]:
        first, other = facts("a"), facts("b")
        return {name for name in first.keys() | other.keys() if first.get(name) != other.get(name)}

    assert different() == set()
    assert facts("a") != facts("a", "--dtype", "float32")
    (tmp_path / "b/ids.json").write_text("[[1, 3]]")
    assert different() == {"--tokens"}
    (tmp_path / "b/model/config.json").write_text("{ }")
    assert different() == {"--tokens", "--model"}
    (tmp_path / "b/model/config.json").write_text("{}")
    (tmp_path / "b/model/x.safetensors").write_bytes(b"123")
    assert different() == {"--tokens", "--model"}


def test_launch_local_passes_the_failure_on(tmp_path: Path) -> None:
    """All processes end, and so does the launcher, with their status."""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "DEVICES": "2"}
    environ.pop("XLA_FLAGS", None)
    command = [str(ROOT / "scripts/launch_local.sh"), "2", "generate", "--model", str(tmp_path / "no"), "--prompt", "a"]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    first, *rest = result.stderr.splitlines()
    assert first.startswith("dsjax: 2 processes (flags), process 0 at 127.0.0.1:")
    assert rest and all("expected a checkpoint folder, found none" in line for line in rest), rest


def test_the_kubernetes_manifest_names_its_own_pods() -> None:
    """Pods are called JOBSET-REPLICATEDJOB-JOB-POD, in a domain called as the JobSet is; the counts agree."""
    jobset = yaml.safe_load((ROOT / "scripts/jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environ = {entry["name"]: entry["value"] for entry in container["env"]}
    name, (port,) = jobset["metadata"]["name"], container["ports"]
    expected = Place(f"{name}-{job['name']}-0-0.{name}", port["containerPort"], spec["completions"], 1, "Kubernetes")
    assert find_place(environ=environ | {"JOB_COMPLETION_INDEX": "1"}) == expected
    assert spec["parallelism"] == spec["completions"]
    options = build_parser().parse_args(container["command"][1:])
    assert (options.verb, options.start_timeout) == ("generate", 900)
    cards = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert options.mesh.devices == cards * spec["completions"]
