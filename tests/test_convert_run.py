"""Conversions as they happen: killed, resumed, shared, refused; the source and finished results stay as they are."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import Capture, drop, edit_json, poke, put, refused, rewrite
from helpers import DENSE_SETTINGS, GOLDENS, SEED, SYNTH_SETTINGS, rng

from dsjax.checkpoint.safetensors import INDEX_FILE, Files
from dsjax.cli.main import main
from dsjax.convert import TARGETS, Options, Share, convert, output, shard, verify
from dsjax.convert import run as conversion
from dsjax.convert.workspace import Growing, Workspace
from dsjax.errors import InputError
from dsjax.synth import synth_config, synthesise

PROGRAM = Path(__file__).with_name("convert_program.py")
SHARD_BYTES = 40_000  # as the program has it


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def beside(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.parent.iterdir())


@pytest.fixture(scope="module")
def reference(v4_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The FP8 of the V4 folder, never interrupted."""
    out = tmp_path_factory.mktemp("reference") / "out"
    convert(v4_folder, out, Options(TARGETS["fp8"]), shard_bytes=SHARD_BYTES)
    assert beside(out) == ["out"]
    return tree(out)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A V3 checkpoint of two layers."""
    folder = tmp_path_factory.mktemp("small") / "model"
    synthesise(folder, synth_config("deepseek-v3", layers=2, settings=SYNTH_SETTINGS))
    return folder


def start(source: Path, out: Path, delay: float, *share: int) -> subprocess.Popen[str]:
    """A conversion that has begun."""
    command = [sys.executable, PROGRAM, source, out, "fp8", str(delay), *map(str, share)]
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n", process.communicate()
    return process


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip()


def kill_and_resume(source: Path, out: Path, reference: dict[str, bytes], times: int, key: int) -> None:
    """Kills runs at moments drawn by the run's seed; each goes on from the one before; a last one ends it."""
    random, delay = rng(key), 0.002
    begun = time.perf_counter()
    assert finish(start(source, out, delay)) == "finished"
    whole = time.perf_counter() - begun
    shutil.rmtree(out)
    moments, done = [], 0
    for _ in range(times):
        moments.append(float(random.uniform(0, whole / 2)))
        process = start(source, out, delay)
        time.sleep(moments[-1])
        process.send_signal(signal.SIGKILL)
        process.communicate()
        what = (moments, SEED)
        if out.exists():  # it was done before it was killed
            assert tree(out) == reference, what
            shutil.rmtree(out)
            done = 0
            continue
        records = len(list((out.parent / f".{out.name}.partial" / "state").glob("shard-*.json")))
        assert records >= done, what  # nothing finished is lost
        done = records
    assert finish(start(source, out, 0)) == "finished"
    assert tree(out) == reference, what
    assert beside(out) == [out.name], what


def test_killed(v4_folder: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    kill_and_resume(v4_folder, tmp_path / "out", reference, 3, 810)


@pytest.mark.full
def test_killed_twenty_times(v4_folder: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    kill_and_resume(v4_folder, tmp_path / "out", reference, 20, 811)


def test_killed_at_every_rename(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Stopped before and after each rename, as a kill there would leave it: the next run ends with the same bytes."""

    class Killed(BaseException):
        pass

    options, rename = Options(TARGETS["bf16"]), os.replace
    convert(small, tmp_path / "reference", options, shard_bytes=60_000)
    expected, count = tree(tmp_path / "reference"), 0
    remove = Path.unlink
    for moment in range(1000):
        calls = 0

        def stopping(a: Any, b: Any, moment: int = moment) -> None:
            nonlocal calls
            calls += 1
            if calls == moment // 2 + 1 and moment % 2 == 0:
                raise Killed
            rename(a, b)
            if calls == moment // 2 + 1:
                raise Killed

        monkeypatch.setattr(os, "replace", stopping)
        monkeypatch.setattr(Path, "unlink", lambda *a, **k: None)  # one who is killed does not tidy up
        try:
            convert(small, tmp_path / "out", options, shard_bytes=60_000)
        except Killed:
            count += 1
        else:
            break
        finally:
            monkeypatch.setattr(os, "replace", rename)
            monkeypatch.setattr(Path, "unlink", remove)
        outcome = convert(small, tmp_path / "out", options, shard_bytes=60_000)
        assert outcome.finished and tree(tmp_path / "out") == expected, moment
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "reference"], moment
        shutil.rmtree(tmp_path / "out")
    assert count > 20


def test_two_processes(v4_folder: Path, tmp_path: Path, reference: dict[str, bytes]) -> None:
    """Side by side: the last one to finish puts the result in its place."""
    out = tmp_path / "out"
    both = [start(v4_folder, out, 0, i, 2) for i in range(2)]
    assert "finished" in [finish(process) for process in both]
    assert tree(out) == reference and beside(out) == ["out"]


def test_one_after_the_other(small: Path, tmp_path: Path) -> None:
    """Three shares on three days, the second one with a shard less to do because another run took over."""
    options = Options(TARGETS["int8-channel"])
    convert(small, tmp_path / "reference", options, shard_bytes=30_000)
    for i in range(3):
        outcome = convert(small, tmp_path / "out", options, share=Share(i, 3), shard_bytes=30_000)
        assert outcome.finished == (i == 2)
    assert tree(tmp_path / "out") == tree(tmp_path / "reference")


def test_finished_shards_are_not_redone(small: Path, tmp_path: Path) -> None:
    options, out = Options(TARGETS["fp8-ue8m0"]), tmp_path / "out"
    convert(small, out, options, share=Share(0, 2), shard_bytes=30_000)
    before = {p.name: p.stat().st_ino for p in (tmp_path / ".out.partial" / "result").iterdir()}
    assert before
    convert(small, out, options, shard_bytes=30_000)
    after = {p.name: p.stat().st_ino for p in out.iterdir()}
    assert before.items() <= after.items()


# --- places ----------------------------------------------------------------------------------------------------------


def run(*arguments: Any) -> list[Any]:
    return ["convert", *arguments]


def test_source_untouched(small: Path, tmp_path: Path) -> None:
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in small.rglob("*") if p.is_file()}
    for to in ("bf16", "int4-group"):
        convert(small, tmp_path / to, Options(TARGETS[to]))
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in small.rglob("*") if p.is_file()}


def test_places_that_are_refused(small: Path, tmp_path: Path, capsys: Capture) -> None:
    for out in (small, small / "below", small.parent):
        refused(capsys, run(small, "--to", "bf16", "--out", out, "--force"), "--out", "apart from the source")
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("kept")
    for flags in ([], ["--force"]):  # nobody's result
        refused(capsys, run(small, "--to", "bf16", "--out", other, *flags), "--out", "something else in it")
    assert (other / "mine.txt").read_text() == "kept"
    (tmp_path / "file").write_text("")
    refused(capsys, run(small, "--to", "bf16", "--out", tmp_path / "file"), "--out", "expected a folder")
    assert beside(other) == ["file", "other"]


def test_force(small: Path, tmp_path: Path, capsys: Capture) -> None:
    """A finished result is replaced only when asked, and stays until the new one is whole."""
    out = tmp_path / "out"
    assert main([str(a) for a in run(small, "--to", "bf16", "--out", out)]) == 0
    first = tree(out)
    refused(capsys, run(small, "--to", "f16", "--out", out), "--force", "finished result")
    assert tree(out) == first
    convert(small, out, Options(TARGETS["f16"]), share=Share(0, 2), shard_bytes=60_000, force=True)
    assert tree(out) == first
    refused(capsys, run(small, "--to", "bf16", "--out", out, "--force", "--only", "nothing"), "--only", "none")
    convert(small, out, Options(TARGETS["f16"]), shard_bytes=60_000, force=True)
    assert json.loads((out / "certificate.json").read_text())["to"] == "f16"
    assert beside(out) == ["out"]


def test_unfinished_of_something_else(small: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    convert(small, out, Options(TARGETS["bf16"]), share=Share(0, 2), shard_bytes=60_000)
    refused(capsys, run(small, "--to", "f16", "--out", out), "unfinished", "another to", "--force")
    assert main([str(a) for a in run(small, "--to", "f16", "--out", out, "--force")]) == 0
    assert beside(out) == ["out"]


def test_unfinished_and_alive(small: Path, tmp_path: Path, capsys: Capture) -> None:
    """Nobody throws away what another process is at work on."""
    out = tmp_path / "out"
    process = start(small, out, 0.05)
    while not (tmp_path / ".out.partial" / "state" / "plan.json").exists():
        time.sleep(0.01)
    refused(capsys, run(small, "--to", "f16", "--out", out, "--force"), ".out.partial", "no process at work")
    assert (tmp_path / ".out.partial" / "result").exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert main([str(a) for a in run(small, "--to", "f16", "--out", out, "--force")]) == 0
    assert beside(out) == ["out"]


@pytest.mark.parametrize("change", [Path.unlink, lambda p: os.truncate(p, 100)])
def test_lost_shard(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """A record alone is no shard: it is made again, and no result is put in its place without it."""
    options, out, bytes_ = Options(TARGETS["bf16"]), tmp_path / "out", 60_000
    convert(small, tmp_path / "reference", options, shard_bytes=bytes_)
    convert(small, out, options, share=Share(0, 2), shard_bytes=bytes_)
    change(sorted((tmp_path / ".out.partial" / "result").glob("model-*"))[0])
    with pytest.raises(InputError, match=r"model-00001.*the next run"):
        convert(small, out, options, share=Share(1, 2), shard_bytes=bytes_)
    assert not out.exists()
    assert convert(small, out, options, shard_bytes=bytes_).finished
    assert tree(out) == tree(tmp_path / "reference")


def test_taken_over_meanwhile(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that another process finishes while this one is at an earlier one is not made twice."""
    out, options, write = tmp_path / "out", Options(TARGETS["bf16"]), shard.ShardWriter.write
    others = 0

    def late(writer: shard.ShardWriter, *arguments: Any) -> Any:
        nonlocal others
        monkeypatch.setattr(shard.ShardWriter, "write", write)
        others = convert(small, out, options, share=Share(1, 2), shard_bytes=60_000).bytes
        return write(writer, *arguments)

    total = convert(small, tmp_path / "reference", options, shard_bytes=60_000).bytes
    monkeypatch.setattr(shard.ShardWriter, "write", late)
    assert total - convert(small, out, options, shard_bytes=60_000).bytes == others > 0
    assert tree(out) == tree(tmp_path / "reference")


def test_space_of_a_stopped_run(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed run left of a file is written over, so it need not be free on the disk; what others left must."""
    asked: list[int] = []
    monkeypatch.setattr(conversion, "check_space", lambda _, needed: asked.append(needed))
    space, options = Workspace(tmp_path / "out"), Options(TARGETS["bf16"])
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # one who is killed does not tidy up
    monkeypatch.setattr(conversion.ShardWriter, "write", lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            convert(small, tmp_path / "out", options, shard_bytes=60_000)
        (left,) = space.state.glob("*.tmp")
        with left.open("wb") as file:
            file.write(b"1" * 40_960)
            os.fsync(file.fileno())
    assert asked[0] - asked[1] == left.stat().st_blocks * 512 >= 40_960


def test_finished_between_open_and_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that another process finishes after it was opened here is not written to: a new one is."""
    path, temporary = tmp_path / "result" / "a", tmp_path / "a.tmp"
    first, lock = Growing(path, temporary), fcntl.flock
    os.write(first.descriptor, b"finished")

    def late(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        first.commit()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    second = Growing(path, temporary)
    os.ftruncate(second.descriptor, 0)
    assert path.read_bytes() == b"finished"
    second.commit()
    assert path.read_bytes() == b""


def test_killed_between_two_results(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old result comes back when the run that was to replace it is thrown away."""
    out, rename = tmp_path / "out", os.replace
    convert(small, out, Options(TARGETS["bf16"]))
    first = tree(out)

    def stopping(a: Any, b: Any) -> None:
        if b == out:
            raise KeyboardInterrupt
        rename(a, b)

    monkeypatch.setattr(os, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        convert(small, out, Options(TARGETS["f32"]), force=True)
    monkeypatch.setattr(os, "replace", rename)
    assert not out.exists()
    with pytest.raises(InputError, match="unfinished"):
        convert(small, out, Options(TARGETS["f16"]))
    assert tree(out) == first
    assert convert(small, out, Options(TARGETS["f16"]), force=True).finished
    assert beside(out) == ["out"]


def test_killed_while_tidying_up(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result stands; when somebody has removed it since, it is made again."""
    out, options = tmp_path / "out", Options(TARGETS["bf16"])

    def stopped() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "rmtree", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                convert(small, out, options)

    stopped()
    first = tree(out)
    outcome = convert(small, out, options)
    assert outcome.finished and outcome.bytes == 0 and beside(out) == ["out"]
    shutil.rmtree(out)
    stopped()
    shutil.rmtree(out)
    assert convert(small, out, options).finished
    assert tree(out) == first and beside(out) == ["out"]


def test_another_finishes_first(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that appears while another run looks at its source is seen before anything is written."""
    out, options, begin = tmp_path / "out", Options(TARGETS["bf16"]), Workspace.begin

    def late(space: Workspace, *arguments: Any, **named: Any) -> bool:
        monkeypatch.setattr(Workspace, "begin", begin)
        convert(small, out, options)
        return begin(space, *arguments, **named)

    monkeypatch.setattr(Workspace, "begin", late)
    with pytest.raises(InputError, match="finished result"):
        convert(small, out, options)
    assert beside(out) == ["out"]


def test_source_of_another_day(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """The scales that a source carries along are part of it; so is the program, as far as its results go."""
    source, out, bytes_ = tmp_path / "source", tmp_path / "out", 100_000
    convert(small, source, Options(TARGETS["bf16"]))
    options = Options(TARGETS["fp8"])
    carried = source / "original_scales"
    names = {p.relative_to(source).as_posix() for p in source.rglob("*.safetensors")}
    convert(source, out, options, share=Share(0, 2), shard_bytes=bytes_)
    carried.rename(tmp_path / "kept")
    with pytest.raises(InputError, match="another source, headers"):
        convert(source, out, options, shard_bytes=bytes_)
    (tmp_path / "kept").rename(carried)
    monkeypatch.setattr(conversion, "CONVERTER", 0)
    with pytest.raises(InputError, match="another converter"):
        convert(source, out, options, shard_bytes=bytes_)
    monkeypatch.undo()
    assert convert(source, out, options, shard_bytes=bytes_).finished
    certified = json.loads((out / "certificate.json").read_text())["source"]["files"]
    assert certified.keys() == names and any("/" in name for name in names)
    assert not verify(out, source)
    path = next(carried.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert str(path) in " ".join(verify(out, source))


@pytest.fixture
def damaged(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "model"))


def test_source_changes_meanwhile(damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish_ = Workspace.finish

    def late(space: Workspace, *arguments: Any, **named: Any) -> None:
        os.utime(next(damaged.glob("*.safetensors")), ns=(0, 0))
        finish_(space, *arguments, **named)

    monkeypatch.setattr(Workspace, "finish", late)
    with pytest.raises(InputError, match=r"safetensors.*changed meanwhile"):
        convert(damaged, tmp_path / "out", Options(TARGETS["bf16"]))
    assert not (tmp_path / "out").exists()


# --- what is refused, and what stops ---------------------------------------------------------------------------------


def test_bad_tensor_and_mended(damaged: Path, tmp_path: Path, capsys: Capture) -> None:
    """Stops with the name; what was finished before is used by the run after the tensor was mended."""
    name = "model.layers.2.mlp.experts.7.down_proj.weight"  # of the last layer
    good = tree(damaged)
    rewrite(damaged, poke(name, 0x7F), shard_bytes=60_000)
    refused(capsys, run(damaged, "--to", "bf16", "--out", tmp_path / "out"), name, "0x7F")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", "model"]
    assert not list((tmp_path / ".out.partial").rglob("*.tmp"))
    shutil.rmtree(damaged)
    damaged.mkdir()
    for path, data in good.items():
        (damaged / path).parent.mkdir(exist_ok=True)
        (damaged / path).write_bytes(data)
    refused(capsys, run(damaged, "--to", "bf16", "--out", tmp_path / "out"), "another", "source")
    assert main([str(a) for a in run(damaged, "--to", "bf16", "--out", tmp_path / "out", "--force")]) == 0


def test_bad_tensors(small: Path, tmp_path: Path, capsys: Capture) -> None:
    weight = "model.layers.1.self_attn.o_proj.weight"
    infinite = np.full((1, 1), 3e38, np.float32)
    for change, names in (
        (drop(weight + "_scale_inv"), (weight + "_scale_inv", "found none")),
        (poke(weight + "_scale_inv", float("nan")), (weight + "_scale_inv", "NaN")),
        (put(weight + "_scale_inv", infinite), (weight, "beyond")),
        (poke("model.norm.weight", float("inf")), ("model.norm.weight", "infinity")),
    ):
        model = Path(shutil.copytree(small, tmp_path / "model"))
        rewrite(model, change)
        refused(capsys, run(model, "--to", "bf16", "--out", tmp_path / "out"), *names)
        assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)
        shutil.rmtree(model)


def test_disk_full(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """A write that fails names the tensor and leaves no half file; with room, the next run goes on from there."""
    out, write, room = tmp_path / "out", os.pwrite, 150_000

    def full(descriptor: int, data: Any, offset: int) -> int:
        nonlocal room
        room -= len(data)
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InputError, match=r"tensor model.* cannot be written: No space left"):
        convert(small, out, Options(TARGETS["f32"]), shard_bytes=60_000)
    monkeypatch.setattr(os, "pwrite", write)
    assert not out.exists() and not list((tmp_path / ".out.partial").rglob("*.tmp"))
    done = {p.name: p.stat().st_ino for p in (tmp_path / ".out.partial" / "result").glob("model-*")}
    assert done
    assert convert(small, out, Options(TARGETS["f32"]), shard_bytes=60_000).finished
    assert done.items() <= {p.name: p.stat().st_ino for p in out.iterdir()}.items()
    assert beside(out) == ["out"]
    assert not verify(out, small)


@pytest.mark.parametrize("failing", [1, 2, -1])
def test_disk_fails_later(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """What one flush on the way is told is told to nobody else: a run that goes on as if nothing were loses bytes."""
    calls = 0

    def flush(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if failing in (calls, -1):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(output, "_flush", flush)
    monkeypatch.setattr(output, "_FLUSH_BYTES", 10_000)
    with pytest.raises(InputError, match=r"model-.*safetensors.*Input/output error"):
        convert(small, tmp_path / "out", Options(TARGETS["bf16"]), shard_bytes=60_000)
    assert calls >= failing and not (tmp_path / "out").exists()
    assert not list((tmp_path / ".out.partial").rglob("*.tmp"))


def test_unsupported(small: Path, tmp_path: Path, capsys: Capture) -> None:
    out = ["--out", tmp_path / "out"]
    refused(capsys, run(small, "--to", "mxfp4", *out), "--to mxfp4", "deepseek_v4", "deepseek_v3")
    refused(capsys, run(small, "--to", "int8-block", *out, "--only", "*.mlp.*"), "--only", "e4m3 and int8")
    refused(capsys, run(small, "--to", "bf16", *out, "--only", "*.experts.1.*"), "--only", "alike")
    refused(capsys, run(small, "--to", "bf16", *out, "--weights", "int8"), "--weights", "orbax")
    refused(capsys, run(small, "--to", "orbax", *out, "--only", "x"), "--only", "orbax")
    refused(capsys, run(small, "--to", "bf16", *out, "--process-id", "2", "--processes", "2"), "--process-id", "0 .. 1")
    refused(capsys, run(small, "--to", "bf16"), "--out")
    refused(capsys, run("--to", "bf16", *out), "DIR")
    refused(capsys, run(tmp_path / "none", "--to", "bf16", *out), "none")
    refused(capsys, run("--verify", small), "certificate.json")
    refused(capsys, run("--verify", small, "--to", "bf16"), "--verify")
    for flags in (["--only", "x"], ["--force"], ["--names", "hf"], ["--report", tmp_path / "r"], ["--processes", 2]):
        refused(capsys, run("--verify", small, *flags), flags[0], "--verify")
    for flags in (["--processes", 2], ["--process-id", 1]):
        refused(capsys, run(small, "--to", "orbax", *out, *flags), flags[0], "orbax")
    refused(capsys, run(small, "--to", "bf16", *out, "--processes", 0), "--processes 0", "at least 1")
    for report in (small / "r.json", tmp_path / "out" / "r.json"):
        refused(capsys, run(small, "--to", "bf16", *out, "--report", report), "--report", "apart from")
    assert not list(tmp_path.iterdir()) and not (small / "r.json").exists()


# --- verify ----------------------------------------------------------------------------------------------------------


def verdict(capsys: Capture, *arguments: Any) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = main([str(a) for a in ("convert", "--verify", *arguments, "--json")])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("to", ["fp8-ue8m0", "int4-group"])
def test_tampered(small: Path, tmp_path: Path, capsys: Capture, to: str) -> None:
    out = tmp_path / "out"
    convert(small, out, Options(TARGETS[to]), shard_bytes=60_000)
    assert verdict(capsys, out)[0] == 0
    status, found = verdict(capsys, out, small)
    assert status == 0 and found["passed"] and found["verdicts"]

    def caught(*names: str, source: Path | None = small) -> None:
        status, found = verdict(capsys, out, *([source] if source else []))
        assert status == 1 and not found["passed"]
        for name in names:
            assert name in " ".join(found["problems"])

    with Files.open(out) as files:
        name = next(n for n in files if ".experts.3." in n and "weight" in n and files[n].nbytes > 100)
        tensor = files[name]
    data = bytearray(tensor.path.read_bytes())
    data[tensor.offset + 7] ^= 1
    kept = tensor.path.read_bytes()
    tensor.path.write_bytes(data)
    caught(tensor.path.name, name)
    caught(tensor.path.name, name, source=None)
    tensor.path.write_bytes(kept)
    made = (out / "certificate.json").read_text()
    entry = next(k for k in json.loads(made)["tensors"] if ".experts.3." in k)

    def forged(change: Any) -> None:
        certificate = json.loads(made)
        change(certificate)
        (out / "certificate.json").write_text(json.dumps(certificate))

    forged(lambda c: c["tensors"][entry].update(exact=True))
    caught(entry, "exact True (certified) and False")
    forged(lambda c: c["tensors"][entry].update(relative_norm=0.0))
    caught(entry, "relative_norm")
    forged(lambda c: c["tensors"].pop(entry))
    caught(entry, "found none")
    forged(lambda c: c["tensors"].update(other=c["tensors"][entry]))
    caught("other")
    (out / "certificate.json").write_text(made)
    config = (out / "config.json").read_text()
    edit_json(out / "config.json", hidden_size=33)
    caught("config.json")
    (out / "config.json").write_text(config)
    shutil.copyfile(tensor.path, out / "more.safetensors")
    caught("more.safetensors", source=None)
    (out / "more.safetensors").unlink()
    (out / INDEX_FILE).rename(out / "gone")
    caught(INDEX_FILE)
    (out / "gone").rename(out / INDEX_FILE)
    caught("source", source=GOLDENS / "v3-mtp")
    assert verdict(capsys, out, small)[0] == 0


def test_report(tmp_path: Path, capsys: Capture) -> None:
    """A distill becomes FP8 and is read again, and its certificate says that it is not exact."""
    folder = tmp_path / "model"
    synthesise(folder, synth_config("deepseek-r1-distill-qwen-1.5b", layers=1, settings=DENSE_SETTINGS))
    report = tmp_path / "report.json"
    arguments = run(folder, "--to", "fp8", "--out", tmp_path / "out", "--report", report, "--json")
    assert main([str(a) for a in arguments]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["finished"] and not said["exact"]
    assert json.loads(report.read_text())["summary"] == said["summary"]
    assert said["summary"]["linear"]["tensors"] == said["summary"]["linear"]["converted"] == 7
    assert said["summary"]["vector"]["converted"] == said["summary"]["matrix"]["converted"] == 0
    assert main(["inspect", str(tmp_path / "out"), "--check"]) == 0
