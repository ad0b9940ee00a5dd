"""Checkpoints in INT8 and INT4, as others write them: loaded bit for bit, and the logits that an emulator gives."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import emulator as em
import numpy as np
import pytest
from helpers import DENSE_SETTINGS, SEED, SYNTH_SETTINGS, V32_SETTINGS, Golden, one_shot, relative_norm
from helpers_integers import ACTIVATIONS, KINDS, Integers, bfloat16, emulating, integer_checkpoint

from dsjax.checkpoint.load import load
from dsjax.cli.main import main
from dsjax.config import IntegerQuantization, load_config, parse_config
from dsjax.errors import InputError
from dsjax.numerics import Numerics
from dsjax.params import abstract_params, table, tree_bytes
from dsjax.plan import load_model
from dsjax.plan.search import model_bytes
from dsjax.synth import synth_config, synthesise
from quant import INT4, INT8, WHOLE, QArray

FLOAT32 = Numerics("plain", "float32", "absorbed")
TOKENS = np.random.default_rng(SEED).integers(2, 320, (1, 10))
# Every expert is chosen: no rounding changes who is. Widths of one and of several groups, and of parts of one.
_EVERY = {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
SETTINGS = SYNTH_SETTINGS | _EVERY | {"hidden_size": 272, "moe_intermediate_size": 136, "intermediate_size": 144}


@lru_cache
def source(preset: str = "deepseek-v3", layers: int = 2) -> Path:
    settings = {"deepseek-v3": SETTINGS, "deepseek-v3.2": V32_SETTINGS}.get(preset, DENSE_SETTINGS)
    folder = Path(mkdtemp(prefix="dsjax-integers-")) / "model"
    config = synth_config(preset, layers=layers, settings={**settings, "num_nextn_predict_layers": 0})
    if preset == "deepseek-v3":
        config["first_k_dense_replace"] = 1
    synthesise(folder, config, seed=SEED, template=preset)
    return folder


@lru_cache
def written(kind: str, preset: str = "deepseek-v3") -> tuple[Path, dict[str, Any], dict[str, Any]]:
    out = Path(mkdtemp(prefix="dsjax-integers-")) / kind
    scales = bfloat16() if kind == "int4-group" else np.float32
    return out, *integer_checkpoint(source(preset), out, kind, scales=scales)


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_the_file_s(kind: str) -> None:
    """Every leaf: the codes that were written, INT4 in two's complement, and their scales, in float32."""
    folder, weights, _ = written(kind)
    config, params, stats = load(folder)
    assert isinstance(config.quantization, IntegerQuantization)
    seen = 0
    for row in table(config):
        for index, name in row.tensors():
            if not isinstance(weights[name], Integers):
                continue
            seen += 1
            leaf, made = _leaf(params, row.path), weights[name]
            codes = np.asarray(leaf.codes)[index]
            if leaf.format == INT4:
                assert leaf.block == (1, 128)
                nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(made.codes.shape)
                codes = ((nibbles ^ 8).astype(np.int8) - 8).view(np.uint8)
            else:
                assert leaf.format == INT8 and leaf.block == ((128, 128) if kind == "int8-block" else (1, WHOLE))
            np.testing.assert_array_equal(codes.view(np.int8), made.codes)
            np.testing.assert_array_equal(np.asarray(leaf.scales)[index], made.scales)
    assert seen == sum(isinstance(w, Integers) for w in weights.values()) > 20
    assert stats.read_bytes == stats.needed_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_emulator_s(kind: str) -> None:
    """In float32, activations quantised as the config says; another choice is far off.

    Bounds: an activation next to a half may round the other way, by one code of one channel.
    """
    folder, weights, raw = written(kind)
    config, params, _ = load(folder)
    numerics = FLOAT32.for_checkpoint(config)
    group = ACTIVATIONS.get(kind)
    assert numerics.activations == {None: "float", 0: "int8", 128: "int8-group"}[group]
    model = Golden(folder, config, params, TOKENS, TOKENS, None)
    found = one_shot(model, TOKENS, numerics)[0][0]
    with emulating(group):
        expected, _ = em.model(TOKENS[0], weights, raw, policy=em.PLAIN)
    errors = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(errors) <= 2e-5 and errors.max() <= 2e-3, f"seed {SEED}: {errors}"
    with emulating(None if group is not None else 0):
        other, _ = em.model(TOKENS[0], weights, raw, policy=em.PLAIN)
    assert relative_norm(other, expected) > 3e-3


@pytest.mark.parametrize(("kind", "preset"), [("int8-channel", "qwen2"), ("w4a8", "qwen2"), ("int8-channel", "v32")])
def test_other_families(kind: str, preset: str) -> None:
    """A distill, and V3.2 with its indexer: close to the values alone, which are close to the source's."""
    name = {"qwen2": "deepseek-r1-distill-qwen-1.5b", "v32": "deepseek-v3.2"}[preset]
    folder, _, _ = written(kind, name)
    tokens = TOKENS[:, :4]  # of any context the indexer chooses four
    logits = []
    for weights in ("stored", "int8"):
        config, params, _ = load(folder, weights=weights)
        numerics = Numerics("plain", "float32").for_checkpoint(config, weights)
        assert numerics.activations == ("int8" if weights == "stored" else "float")
        logits.append(one_shot(Golden(folder, config, params, tokens, tokens, None), tokens, numerics)[0])
    assert 1e-4 < relative_norm(logits[0], logits[1]) < 0.1


@pytest.mark.parametrize("kind", ["int8-channel", "int8-block", "int4-group"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16", "fp8", "int8", "w8a8", "w4a8"])
def test_other_resident_formats(kind: str, weights: str) -> None:
    """Floats have the values, rounded once; integers stay what they are, but for INT8 where INT4 is asked for."""
    folder, made, _ = written(kind)
    config, params, _ = load(folder, weights=weights)
    stored = load(folder)[1]
    for row in table(config):
        index, name = next(row.tensors())
        if not isinstance(made[name], Integers):
            continue
        leaf = _leaf(params, row.path)
        values = np.asarray(made[name])
        if weights == "float32":
            np.testing.assert_array_equal(np.asarray(leaf)[index], values)
        elif weights in ("bfloat16", "float16"):
            dtype = bfloat16() if weights == "bfloat16" else np.float16
            np.testing.assert_array_equal(np.asarray(leaf.codes)[index], values.astype(dtype).view(np.uint16))
        elif weights == "w4a8" and row.experts and kind != "int4-group":
            assert leaf.format == INT4 and isinstance(leaf, QArray)
        else:
            same = _leaf(stored, row.path)
            assert (leaf.format, leaf.block) == (same.format, same.block)
            np.testing.assert_array_equal(np.asarray(leaf.codes), np.asarray(same.codes))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`inspect` counts the file's, the planner those that are held; a config alone is planned alike."""
    folder, _, raw = written(kind)
    data = (folder / "model.safetensors").read_bytes()
    assert main(["inspect", str(folder), "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == len(data) - 8 - int.from_bytes(data[:8], "little")
    for weights in ("stored", "int8", "w4a8", "bfloat16"):
        model = load_model(str(folder), Numerics(), weights)
        held = load(folder, weights=weights)[1]
        assert model_bytes(model) == tree_bytes(held)
        assert tree_bytes(abstract_params(parse_config(raw), weights=weights)) == tree_bytes(held)


# --- what is refused -------------------------------------------------------------------------------------------------

GATE = "model.layers.1.mlp.experts.2.gate_proj"


def _drop(name: str) -> Any:
    return lambda tensors, config: tensors.pop(name)


def _set(name: str, f: Any) -> Any:
    return lambda tensors, config: tensors.__setitem__(name, f(tensors[name]))


def _config(path: str, value: Any) -> Any:
    def change(_: dict[str, Any], config: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        node = config["quantization_config"]
        for key in parents:
            node = node[key]
        node[last] = value

    return change


def _rename(old: str, new: str) -> Any:
    return lambda tensors, config: tensors.__setitem__(new, tensors[old])


_WEIGHTS = "config_groups.group_0.weights."
BAD: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "no scale": ("int8-channel", _drop(GATE + ".weight_scale"), (GATE + ".weight_scale:", "[136, 1]", "found none")),
    "no weight": ("w4a8", _drop(GATE + ".weight_packed"), (GATE + ".weight_packed:", "int32 [136, 34]", "found none")),
    "scale per block": ("int8-channel", _set(GATE + ".weight_scale", lambda a: a[:2]), (GATE, "[136, 1]", "[2, 1]")),
    "integer scale": ("int8-block", _set(GATE + ".weight_scale_inv", lambda a: a.astype(np.int32)), (GATE, "int32")),
    "floats": ("int8-channel", _set(GATE + ".weight", lambda a: a.astype(np.float32)), (GATE, "int8 [", "float32 [")),
    "unsigned": ("int8-channel", _set(GATE + ".weight", lambda a: a.view(np.uint8)), (GATE, "int8 [", "uint8 [")),
    "no shape": ("w4a8", _drop(GATE + ".weight_shape"), (GATE + ".weight_shape", "int64 [136, 272]", "found none")),
    "wrong shape": ("w4a8", _set(GATE + ".weight_shape", lambda a: a[::-1]), (GATE, "[136, 272]", "[272, 136]")),
    "narrow shape": ("w4a8", _set(GATE + ".weight_shape", lambda a: a.astype(np.int32)), (GATE, "int64", "int32")),
    "not packed": ("w4a8", _set(GATE + ".weight_packed", lambda a: a.view(np.int8)), (GATE, "int32 [136, 34]", "int8")),
    "too narrow": ("w4a8", _set(GATE + ".weight_packed", lambda a: a[:, 1:]), (GATE, "[136, 34]", "[136, 33]")),
    "two spellings": ("w4a8", _rename(GATE + ".weight_packed", GATE + ".weight"), (GATE, "found both")),
    "zero points": ("w4a8", _rename(GATE + ".weight_scale", GATE + ".weight_zero_point"), ("weight_zero_point", "no")),
    "NaN scale": ("int8-channel", _set(GATE + ".weight_scale", lambda a: a * np.nan), (GATE, "finite", "NaN")),
    "ignored": ("int8-channel", _config("ignore", [GATE]), (GATE, "float32", "int8")),
    "asymmetric": ("int8-channel", _config(_WEIGHTS + "symmetric", False), ("symmetric", "true", "false")),
    "static": ("int8-channel", _config("config_groups.group_0.input_activations.dynamic", False), ("dynamic",)),
    "per tensor": ("int8-channel", _config(_WEIGHTS + "strategy", "tensor"), ("strategy", "channel", "tensor")),
    "group of 32": ("w4a8", _config(_WEIGHTS + "group_size", 32), ("group_size", "128", "32")),
    "five bits": ("w4a8", _config(_WEIGHTS + "num_bits", 5), ("num_bits", "8 or 4", "5")),
    "unpacked INT4": ("w4a8", _config("format", "int-quantized"), ("format", "pack-quantized")),
    "no groups": ("w4a8", _config("config_groups", {}), ("config_groups", "a group")),
    "no weights": ("w4a8", _config("config_groups.group_0.weights", None), ("group_0", "weights")),
    "no targets": ("w4a8", _config("config_groups.group_0.targets", []), ("targets",)),
    "bad expression": ("w4a8", _config("ignore", ["re:("]), ("ignore", "plain expressions after re:")),
    "slow expression": ("w4a8", _config("ignore", ["re:([a-z0-9_.]+)+!"]), ("ignore", "plain expressions after re:")),
    "groups differ": ("w4a8-mixed", _config("config_groups.group_0.input_activations", None), ("agree",)),
    "KV scheme": ("w4a8", _config("kv_cache_scheme", {"num_bits": 8}), ("kv_cache_scheme",)),
    "blocks of 64": ("int8-block", _config("weight_block_size", [64, 64]), ("weight_block_size", "[128, 128]")),
    "static blocks": ("int8-block", _config("activation_scheme", "static"), ("activation_scheme", "dynamic")),
    "gate beside up": (
        "w4a8-mixed",
        _config("config_groups.group_0.targets", [r"re:.*\.experts\.\d+\.gate"]),
        ("up_proj", "int8 [136, 272]", "int32 [136, 34]"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the file, the tensor or field, what was expected and found; status 2."""
    kind, change, wanted = BAD[name]
    folder = tmp_path / "model"
    integer_checkpoint(source(), folder, kind, change=change)
    assert main(["generate", "--model", str(folder), "--prompt-ids", "5", "--max-new-tokens", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and str(folder) in err
    for text in wanted:
        assert text in err, err


def test_native_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """On a checkpoint in integers, and with activations in integers on any other."""
    for folder, weights in ((written("int8-channel")[0], "stored"), (source(), "w8a8"), (source(), "w4a8")):
        flags = ["--model", str(folder), "--numerics", "native", "--weights", weights]
        assert main(["generate", *flags, "--prompt-ids", "5"]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and "--numerics native" in err and re.search("integers|--weights w.a8", err)
    floats = load_config(source("deepseek-r1-distill-qwen-1.5b"))
    with pytest.raises(InputError, match="w8a8 cannot be combined with --numerics native"):
        Numerics("native").for_checkpoint(floats, "w8a8")


def test_module_names() -> None:
    """Names before classes, ignored before both; regular expressions match from the start."""
    config = parse_config(written("w4a8-mixed")[2])
    assert isinstance(config.quantization, IntegerQuantization)
    formats = {
        "model.layers.1.mlp.experts.3.up_proj": "int4",
        "model.layers.1.mlp.shared_experts.up_proj": "int8",
        "model.layers.1.self_attn.o_proj": "int8",
        "model.layers.1.mlp.gate": None,
        "lm_head": None,
    }
    assert {name: config.quantization.format_of(name) for name in formats} == formats
