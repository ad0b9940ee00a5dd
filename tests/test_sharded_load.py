"""Loaded onto a mesh: the bits of what is loaded whole, cut; each process reads its own part once and holds no more."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from damage import poke, rewrite
from helpers import DENSE_NAMES, GOLDENS, NAMES, ROOT, SEED, V4_NAMES, V32_NAMES, golden, rng
from helpers_sharded import assert_cut
from jax.sharding import NamedSharding, PartitionSpec
from load_program import checksums

from dsjax.checkpoint import load as loading
from dsjax.checkpoint import orbax
from dsjax.checkpoint.agreement import agree, check_copies
from dsjax.checkpoint.load import load
from dsjax.checkpoint.names import open_files
from dsjax.checkpoint.safetensors import Files
from dsjax.config import Config, load_config
from dsjax.errors import InputError
from dsjax.layout import working_plans
from dsjax.numerics import Numerics
from dsjax.parallel import Parallel, parallel
from dsjax.params import Row, Tree, abstract_params, is_mtp, table, tree_bytes
from dsjax.synth import synth_config, synthesise
from sharding import Plan, make_mesh, parse_plan

PLAIN = Numerics("plain", "float32")
EVERY = NAMES + V32_NAMES + DENSE_NAMES + V4_NAMES


def plans(config: Config, count: int, *key: int) -> list[tuple[Plan, str, str]]:
    """Plans of 2 to 16 devices that work, with how attention and V4's groups are split, drawn by the run's seed."""
    found = [
        (plan, attention, groups)
        for devices in (2, 3, 4, 6, 8, 12, 16)
        for attention in ("heads", "slots")
        for groups in (("split", "gather") if config.model_type == "deepseek_v4" else ("split",))
        for plan in working_plans(config, devices, attention, PLAIN, groups)
    ]
    chosen = rng(90, *key).choice(len(found), min(count, len(found)), replace=False)
    return [found[i] for i in sorted(chosen)]


@pytest.mark.parametrize("name", EVERY)
def test_loaded_onto_a_mesh(name: str) -> None:
    """Codes, scales, vectors, ids of every family: what is loaded whole and then cut, on every device."""
    model = golden(name)
    mtp = "mtp" in model.params
    with open_files(model.folder, model.config) as files:
        stored = agree(files, model.config)
    for plan, attention, groups in plans(model.config, 2, EVERY.index(name)):
        print(f"seed {SEED}: {plan}, {attention}, {groups}")
        meshed = parallel(model.config, plan, PLAIN, attention=attention, o_groups=groups)
        _, params, stats = load(model.folder, mtp=mtp, sharding=meshed.sharding, cut=meshed.cut)
        assert_cut(params, model.params, meshed)
        abstract = abstract_params(model.config, mtp=mtp, stored=stored, cut=meshed.cut)
        assert jax.tree.structure(abstract) == jax.tree.structure(params)
        assert all(
            (a.shape, a.dtype) == (b.shape, b.dtype)
            for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(params), strict=True)
        )
        assert stats.bytes == sum(s.data.nbytes for a in jax.tree.leaves(params) for s in a.addressable_shards)
        assert stats.peak_staging_bytes == 0


@pytest.mark.parametrize(
    ("name", "plan", "attention", "groups", "finer"),
    [
        ("v3-fp8-partial", "tp=4", "heads", "split", True),
        ("v3-fp8-partial", "ep=3,tp=4", "slots", "split", True),
        ("v3-fp8-e8m0", "dp=2,tp=4", "heads", "split", True),
        ("v3-fp8-u8", "ep=4,tp=2", "heads", "split", True),
        ("v3-fp8-ue8m0", "ep=8,tp=2", "slots", "split", True),
        ("v31-terminus", "tp=2", "heads", "split", True),
        ("v32-fp8", "ep=2,tp=4", "heads", "split", True),
        ("v4-flash", "tp=4", "heads", "split", True),
        ("v4-flash", "tp=4", "heads", "gather", True),
        ("v4-pro", "tp=8", "heads", "split", True),
        ("v4-u8", "ep=4,tp=4", "slots", "split", True),
        ("v4-base", "tp=2", "heads", "split", True),
        ("qwen2-untied", "tp=4", "heads", "split", False),
    ],
)
def test_plans_that_cut_blocks(name: str, plan: str, attention: str, groups: str, finer: bool) -> None:
    """128 x 128 blocks, whole and partial, and groups of 32; V4 on twice as many devices as it has output groups."""
    model = golden(name)
    meshed = parallel(model.config, parse_plan(plan), PLAIN, attention=attention, o_groups=groups)
    _, params, _ = load(model.folder, mtp="mtp" in model.params, sharding=meshed.sharding, cut=meshed.cut)
    assert (assert_cut(params, model.params, meshed) > 0) == finer


@pytest.mark.parametrize(
    ("name", "weights", "limit"),
    [
        *[("v3-fp8-partial", weights, 1500) for weights in ("float32", "bfloat16", "int8")],
        *[("v4-flash", weights, 1 << 20) for weights in ("bfloat16", "int8")],
        *[("v3-float32", weights, 1500) for weights in ("fp8", "int8")],
        *[("qwen2-untied", weights, 1 << 20) for weights in ("fp8", "int8")],
    ],
)
def test_other_formats_onto_a_mesh(name: str, weights: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """New scales are those of whole rows and blocks, wherever shards and regions cut; then made finer."""
    monkeypatch.setattr(loading, "STAGING_BYTES", limit)
    model = golden(name)
    mtp = "mtp" in model.params
    whole = load(model.folder, mtp=mtp, weights=weights)[1]
    for plan, attention, groups in [(Plan(tp=4), "heads", "split"), *plans(model.config, 1, 91, EVERY.index(name))]:
        print(f"seed {SEED}: {plan}, {attention}, {groups}")
        meshed = parallel(model.config, plan, PLAIN, attention=attention, o_groups=groups)
        _, params, _ = load(model.folder, mtp=mtp, weights=weights, sharding=meshed.sharding, cut=meshed.cut)
        finer = assert_cut(params, whole, meshed)
        assert (finer > 0) or weights != "fp8" or plan != Plan(tp=4)


def test_staged_onto_a_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As devices with memory of their own are filled: the same bits, no region above the limit, each staged once."""
    monkeypatch.setattr(loading, "STAGING_BYTES", 5000)
    model = golden("v3-fp8-partial")
    meshed = parallel(model.config, Plan(tp=2), PLAIN)
    _, params, stats = load(model.folder, sharding=meshed.sharding, cut=meshed.cut, in_place=False)
    assert_cut(params, {k: model.params[k] for k in params}, meshed)
    assert 0 < stats.peak_staging_bytes <= 5000
    one_each = {
        (i, str(shard.index)): shard.data.nbytes
        for i, array in enumerate(jax.tree.leaves(params))
        for shard in array.addressable_shards
    }
    assert stats.bytes > sum(one_each.values()) > stats.peak_staging_bytes
    assert stats.regions < stats.bytes // 1000


# --- what is read ----------------------------------------------------------------------------------------------------


def load_as(process: int, processes: int, folder: Path, meshed: Parallel, **kwargs: Any) -> loading.LoadStats:
    """Loads as one of several processes would, each with some of the devices; the parts are not joined."""
    devices = list(meshed.mesh.devices.flat)
    each, original = len(devices) // processes, loading.local_parts
    own = devices[process * each : (process + 1) * each]

    def local_parts(sharding: Any, shape: tuple[int, ...]) -> dict[Any, list[jax.Device]]:
        parts = original(sharding, shape)
        mine = {bounds: [d for d in devices if d in own] for bounds, devices in parts.items()}
        return {bounds: devices for bounds, devices in mine.items() if devices}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "local_parts", local_parts)
        patch.setattr(jax, "make_array_from_single_device_arrays", lambda shape, sharding, shards: shards[0])
        return load(folder, sharding=meshed.sharding, cut=meshed.cut, **kwargs)[2]


def file_bytes(folder: Path, config: Config, ways: Callable[[Row, str], int], mtp: bool = False) -> float:
    """Bytes of the main model's tensors in its files, those of a row's codes or scales divided by `ways`; with `mtp`
    also the draft module's own, not its copies of the main model's."""
    total = 0.0
    with open_files(folder, config) as files:
        for row in table(config):
            wanted = row.copy_of is None if mtp else not is_mtp(row)
            for _, name in row.tensors() if wanted else ():
                for part, tensor in (("codes", name), ("scales", row.scale_name(name))):
                    total += files[tensor].nbytes / ways(row, part) if tensor in files else 0
    return total


def between(meshed: Parallel, count: int) -> Callable[[Row, str], int]:
    """Into how many parts a row is cut between so many processes; those of one process's devices lie together."""
    inside: dict[str, int] = {}  # of each mesh axis, how much lies within a process: the last axes
    left = meshed.mesh.size // count
    for axis, extent in reversed(meshed.mesh.shape.items()):
        inside[axis] = math.gcd(extent, left)
        left //= inside[axis]

    def ways(row: Row, part: str) -> int:
        axes = meshed.rules.axes(*row.logical_axes)
        return math.prod(meshed.rules.extents[axis] // inside[axis] for axis in axes)

    return ways


@pytest.mark.parametrize("in_place", [True, False])
def test_replicas_are_read_once(in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By two devices that have everything; and where they are the host's own, they share its memory."""
    model = golden("v3-fp8-e8m0")
    taken: list[int] = []
    original = Files.read_part

    def read_part(self: Files, name: str, part: Any, out: np.ndarray) -> None:
        taken.append(out.nbytes)
        original(self, name, part, out)

    monkeypatch.setattr(Files, "read_part", read_part)
    where = NamedSharding(make_mesh(Plan(dp=2)), PartitionSpec())
    _, params, stats = load(model.folder, sharding=where, in_place=in_place)
    expected = file_bytes(model.folder, model.config, lambda row, part: 1)
    assert stats.read_bytes == stats.needed_bytes == sum(taken) == expected
    assert stats.bytes == 2 * tree_bytes(params)
    for array in jax.tree.leaves(params):
        one, two = (shard.data for shard in array.addressable_shards)
        assert (one.unsafe_buffer_pointer() == two.unsafe_buffer_pointer()) == in_place
        np.testing.assert_array_equal(one, two)
    kept = np.array(params["norm"])
    one, two = (shard.data for shard in params["norm"].addressable_shards)
    out = jax.jit(lambda x: x + 1, donate_argnums=0)(one)
    assert one.is_deleted()
    np.testing.assert_array_equal(out, kept + 1)
    np.testing.assert_array_equal(two, kept)  # who is given one device's memory must not write into the others'


@pytest.mark.parametrize(
    ("name", "plan", "count"),
    [
        ("v3-fp8-partial", "tp=4", 4),
        ("v3-fp8-partial", "tp=4", 2),
        ("v3-fp8-e8m0", "ep=4,tp=2", 4),
        ("v32-fp8", "dp=2,ep=2", 4),
        ("v31-terminus", "ep=2,tp=2", 2),
        ("v4-pro", "tp=8", 4),
        ("v4-flash", "ep=2,tp=2", 2),
        ("llama-hf", "tp=4", 4),
    ],
)
def test_each_process_reads_its_own(name: str, plan: str, count: int) -> None:
    """Of every tensor the part that its devices hold, each part once: in sum at most 1.05 times what is needed.

    What is needed is counted here from headers and rules alone, a scale per block as if no shard cut one.
    """
    model = golden(name)
    meshed = parallel(model.config, parse_plan(plan), PLAIN)
    stats = [load_as(i, count, model.folder, meshed) for i in range(count)]
    needed = count * file_bytes(model.folder, model.config, between(meshed, count))
    read = sum(s.read_bytes for s in stats)
    assert needed <= read <= 1.05 * needed
    assert all(s.read_bytes <= s.needed_bytes for s in stats)
    assert read < 0.9 * count * file_bytes(model.folder, model.config, lambda row, part: 1)
    assert sum(s.bytes for s in stats) == sum(
        leaf.size * leaf.dtype.itemsize * meshed.mesh.size
        for leaf in jax.tree.leaves(meshed.layout.local(*_shapes(model.folder, meshed)))
    )


def _shapes(folder: Path, meshed: Parallel) -> tuple[Tree, Tree]:
    """Abstract parameters of a checkpoint's own storage on a mesh, and their specs."""
    with open_files(folder, meshed.config) as files:
        stored = agree(files, meshed.config)
    params = abstract_params(meshed.config, stored=stored, cut=meshed.cut)
    return params, meshed.layout.param_specs(params, meshed.config)


def in_processes(folder: Path, plan: str, count: int, devices: int, tmp_path: Path) -> list[dict[str, Any]]:
    """What each of so many real processes, of so many devices each, writes down of a load."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    environ.pop("XLA_FLAGS", None)
    program, outs = Path(__file__).with_name("load_program.py"), [tmp_path / f"{i}.json" for i in range(count)]
    running = [
        subprocess.Popen(
            [sys.executable, str(program), coordinator, str(count), str(i), str(folder), plan, str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environ,
            text=True,
        )
        for i, out in enumerate(outs)
    ]
    try:
        for process in running:
            err = process.communicate(timeout=120)[1]
            assert process.returncode == 0, err
    finally:
        for process in running:
            process.kill()
    return [json.loads(out.read_text()) for out in outs]


@pytest.mark.parametrize(
    ("name", "plan", "count"),
    [
        ("v3-mtp", "dp=2,tp=2", 2),
        ("v3-mtp orbax", "dp=2,tp=2", 2),
        pytest.param("v3-fp8-e8m0", "ep=4", 4, marks=pytest.mark.full),
        pytest.param("v32-float32", "ep=2,tp=2", 4, marks=pytest.mark.full),
        pytest.param("v4-pro", "tp=8", 4, marks=pytest.mark.full),
        pytest.param("llama-hf", "tp=4", 2, marks=pytest.mark.full),
    ],
)
def test_real_processes(name: str, plan: str, count: int, tmp_path: Path) -> None:
    """Over gloo, a draft module beside: shards as one process loads them, each part read once."""
    name, _, converted = name.partition(" ")
    model = golden(name)
    mtp = "mtp" in model.params
    folder = tmp_path / "O" if converted else model.folder
    if converted:
        orbax.save(folder, model.folder, model.params)
    meshed = parallel(model.config, parse_plan(plan), PLAIN)
    found = in_processes(folder, plan, count, meshed.mesh.size // count, tmp_path)
    expected = checksums(load(model.folder, mtp=mtp, sharding=meshed.sharding, cut=meshed.cut)[1])
    # Devices of processes have other numbers: of the second one 2048 and up, or 131072 and up.
    order = {n: i for i, n in enumerate(sorted({int(name.split()[-1]) for f in found for name in f["shards"]}))}
    shards = {name: crc for f in found for name, crc in f["shards"].items()}
    assert {f"{' '.join(n.split()[:-1])} {order[int(n.split()[-1])]}": crc for n, crc in shards.items()} == expected
    if converted:
        return
    assert all(f["read"] == f["needed"] for f in found)
    needed = count * file_bytes(folder, model.config, between(meshed, count), mtp)
    if name == "v3-mtp":  # of its two copies (embedding, head) each process compares a share with what they are of
        needed += 2 * 2 * 2 * model.config.vocab_size * model.config.hidden_size  # bfloat16
    read = sum(f["read"] for f in found)
    print(f"{name} {plan}, {count} processes: {read:,} bytes read, {needed:,.0f} needed")
    assert needed <= read <= 1.05 * needed


def test_new_scales_are_read_for_once() -> None:
    """INT8: rows that are split are read twice where they lie; of columns that are split, whole rows besides."""
    model = golden("v3-float32")
    meshed = parallel(model.config, Plan(tp=4), PLAIN)
    for i in range(4):
        stats = load_as(i, 4, model.folder, meshed, weights="int8")
        expected = 0.0
        for row in table(model.config):
            if is_mtp(row):
                continue
            with open_files(model.folder, model.config) as files:
                nbytes = sum(files[name].nbytes for _, name in row.tensors())
            expected += nbytes / meshed.rules.ways(*row.logical_axes)
            if row.storage in ("linear", "matrix") and not {"embed", "router"} & set(row.path):
                expected += nbytes / meshed.rules.ways(*row.logical_axes[:-1])
        assert stats.read_bytes == stats.needed_bytes == expected


# --- NaN -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("golden_name", "tensor", "value", "finder"),
    [
        ("v3-fp8-partial", "model.layers.1.mlp.experts.2.down_proj.weight", 0xFF, 3),  # the last row's last column
        ("v3-fp8-partial", "model.layers.1.mlp.experts.2.gate_proj.weight", 0xFF, 3),
        ("v3-fp8-partial", "model.layers.0.mlp.down_proj.weight_scale_inv", np.float32(np.nan), 3),
        ("v3-fp8-partial", "lm_head.weight", np.float32(np.nan), 3),
    ],
)
def test_who_finds_nan(golden_name: str, tensor: str, value: Any, finder: int, tmp_path: Path) -> None:
    """The process that reads it, and nobody else: the others have not looked."""
    folder = Path(shutil.copytree(GOLDENS / golden_name, tmp_path / "model"))
    rewrite(folder, poke(tensor, value))
    meshed = parallel(load_config(folder), Plan(tp=4), PLAIN)
    for i in range(4):
        if i == finder:
            with pytest.raises(InputError, match=f"tensor {tensor}: expected"):
                load_as(i, 4, folder, meshed)
        else:
            load_as(i, 4, folder, meshed)


@pytest.mark.parametrize("weights", ["stored", "bfloat16", "int8"])
def test_nan_in_any_column_is_found(weights: str, tmp_path: Path) -> None:
    """By one process whose devices have the columns between them."""
    folder, name = tmp_path / "model", "model.layers.1.mlp.experts.1.down_proj.weight"
    shutil.copytree(GOLDENS / "v3-fp8-partial", folder)
    with Files.open(folder) as files:
        tensor = files[name]
    meshed = parallel(load_config(folder), Plan(tp=4), PLAIN)
    at = tensor.offset + int(rng(92).integers(tensor.nbytes))
    with tensor.path.open("r+b") as file:
        file.seek(at)
        file.write(b"\x7f")
    with pytest.raises(InputError, match=f"tensor {name}: expected no NaN code"):
        load(folder, weights=weights, sharding=meshed.sharding, cut=meshed.cut)


def test_processes_share_the_comparison_of_copies(tmp_path: Path) -> None:
    """Each compares some of the rows, all of them together every row once; one of them finds what differs."""
    folder = Path(shutil.copytree(GOLDENS / "v3-mtp", tmp_path / "model"))
    config = load_config(folder)
    rows = {row.path: row for row in table(config)}
    copies = [row for row in rows.values() if row.copy_of is not None]
    assert len(copies) == 2
    for row in copies:
        (_, name), original = next(row.tensors()), rows[row.copy_of or ()]
        with Files.open(folder) as files:
            nbytes = files[name].nbytes
            assert [check_copies(files, row, original, i, 3) for i in range(3)] != [0, 0, 2 * nbytes]
            assert sum(check_copies(files, row, original, i, 3) for i in range(3)) == 2 * nbytes
        change = rng(93).integers(0, files[name].shape[0])

        def damage(tensors: dict[str, np.ndarray], name: str = name, change: int = int(change)) -> None:
            tensors[name].view(np.uint8)[change, 3] ^= 1

        rewrite(folder, damage)
        with Files.open(folder) as files:
            found = []
            for i in range(3):
                try:
                    check_copies(files, row, original, i, 3)
                except InputError:
                    found.append(i)
            assert len(found) == 1, (name, change, found)


# --- what is held ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of few, wide matrices, 37 MB: embedding and head of 8 MB, feed-forward layers of 4."""
    settings = {
        "hidden_size": 1024,
        "vocab_size": 4096,
        "intermediate_size": 4096,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "q_lora_rank": 256,
        "num_nextn_predict_layers": 0,
    }
    folder = tmp_path_factory.mktemp("wide") / "model"
    synthesise(folder, synth_config("deepseek-v3", layers=1, settings=settings), seed=SEED)
    return folder


@pytest.mark.parametrize("in_place", [True, False])
def test_nothing_is_ever_whole(in_place: bool, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No device ever holds more than its part and one staged region; nor the host, beside what devices hold in its
    memory, more than a region and what that is made of."""
    limit = 512 << 10
    monkeypatch.setattr(loading, "STAGING_BYTES", limit)
    config = load_config(wide)
    meshed = parallel(config, Plan(tp=4), PLAIN)
    local = jax.tree.leaves(meshed.layout.local_params(config))
    whole = jax.tree.leaves(meshed.layout.abstract_params(config))
    share, largest = (f(a.size * a.dtype.itemsize for a in local) for f in (sum, max))
    assert max(a.size * a.dtype.itemsize for a in whole) == 4 * largest > 15 * limit
    devices = list(meshed.mesh.devices.flat)
    others = {id(array): array for array in jax.live_arrays()}  # of other tests, many: looked at once

    def held() -> dict[jax.Device, int]:
        """Bytes in each device's buffers, each buffer once."""
        found: dict[jax.Device, dict[int, int]] = {d: {} for d in devices}
        for array in jax.live_arrays():
            for shard in () if id(array) in others else array.addressable_shards:
                if shard.device in found:
                    found[shard.device][shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
        return {device: sum(buffers.values()) for device, buffers in found.items()}

    assert held() == dict.fromkeys(devices, 0)
    original = loading.LoadStats.staged
    looked = []

    def staged(self: loading.LoadStats, nbytes: int) -> None:
        original(self, nbytes)
        assert max(held().values()) <= share + limit
        looked.append(nbytes)

    monkeypatch.setattr(loading.LoadStats, "staged", staged)
    tracemalloc.start()
    try:
        _, params, stats = load(wide, sharding=meshed.sharding, cut=meshed.cut, in_place=in_place)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held() == dict.fromkeys(devices, share)
    once = {
        (i, str(shard.index)): shard.data.nbytes
        for i, array in enumerate(jax.tree.leaves(params))
        for shard in array.addressable_shards
    }
    python = 4 << 20  # headers, what programs leave behind
    print(f"seed {SEED}: {peak:,} bytes at most")
    if in_place:
        assert (looked, stats.peak_staging_bytes) == ([], 0)
        assert sum(once.values()) <= peak <= sum(once.values()) + 2 * limit + python
    else:
        assert max(looked) == stats.peak_staging_bytes <= limit
        assert peak <= 2 * limit + python < 3 * largest
