"""Converted checkpoints are loaded, here and by Hugging Face, and give the logits that their certificates promise."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from damage import put, rewrite
from helpers import (
    DENSE_SETTINGS,
    GOLDENS,
    SYNTH_SETTINGS,
    V4_SETTINGS,
    counts,
    golden,
    one_shot,
    read_golden,
    relative_norm,
    step_of,
    worst,
)

from dsjax.checkpoint.load import load
from dsjax.checkpoint.names import official_name
from dsjax.checkpoint.safetensors import Files
from dsjax.config import V4Config, load_config
from dsjax.convert import TARGETS, Options, convert, verify
from dsjax.convert.names import hugging_face_name
from dsjax.convert.plan import CARRIED
from dsjax.models import family
from dsjax.numerics import Numerics
from dsjax.params import table
from dsjax.synth import synth_config, synthesise

BOUND = 2e-5  # of the largest logit, against Hugging Face


def made(source: Path, out: Path, to: str, only: str | None = None, names: str | None = None) -> dict[str, Any]:
    """Converts; the certificate, after it was verified."""
    outcome = convert(source, out, Options(TARGETS[to], only, names), shard_bytes=100_000)
    assert outcome.certificate is not None
    assert not verify(out, source)
    return outcome.certificate


def tensors(folder: Path) -> dict[str, tuple[str, bytes]]:
    with Files.open(folder) as files:
        return {name: (files[name].dtype.name, files.read(name).tobytes()) for name in files}


def logits(source: Path, folder: Path) -> np.ndarray:
    """Of a converted golden, for the golden's tokens."""
    shutil.copy(source / "reference.npz", folder / "reference.npz")
    model = read_golden(folder)
    (folder / "reference.npz").unlink()
    return one_shot(model, model.tokens)[0]


def own_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Of any folder, one sequence of tokens, in float32."""
    config, params, _ = load(folder)
    module, numerics = family(config), Numerics("plain", "float32").for_checkpoint(config)
    cache = module.new_cache(config, numerics, 1, 16)
    step = step_of(config, numerics)
    return np.asarray(step(params, cache, jnp.asarray(tokens), counts(tokens.shape[1]))[0])


# --- here ------------------------------------------------------------------------------------------------------------


def full(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.full)


EXACT = [
    ("v3-fp8-ue8m0", "bf16"),
    ("qwen2-tied", "f32"),
    full("v3-fp8-e8m0", "fp8"),
    full("v3-fp8-u8", "fp8-ue8m0"),
    full("v32-fp8", "bf16"),
    full("v3-mtp", "f32"),
    full("v4-flash", "fp8"),
    full("v4-flash", "bf16"),
    full("v4-pro", "fp8-ue8m0"),
    full("v4-u8", "f32"),
    full("v4-base", "bf16"),
    full("llama-llama3", "bf16"),
]


@pytest.mark.parametrize(("name", "to"), EXACT)
def test_exact(name: str, to: str, tmp_path: Path) -> None:
    """Equal weights, equal logits: what is certified as exact changes no logit but by the order of sums."""
    certificate = made(GOLDENS / name, tmp_path / "out", to)
    assert certificate["exact"]
    model = golden(name)
    expected, _, _ = one_shot(model, model.tokens)
    assert worst(logits(GOLDENS / name, tmp_path / "out"), expected) <= 1e-5


INEXACT = [
    ("qwen2-untied", "fp8-ue8m0", 2**-4),
    full("v3-mtp", "bf16", 2**-8),
    full("v31-terminus", "f16", 2**-10),
    full("v3-bf16", "fp8", 2**-4),
    full("v4-hf", "mxfp4", 0.5),
]


@pytest.mark.parametrize(("name", "to", "bound"), INEXACT)
def test_inexact(name: str, to: str, bound: float, tmp_path: Path) -> None:
    """Where values are rounded, a tensor's error is within the format's step, and all logits are finite and near."""
    certificate = made(GOLDENS / name, tmp_path / "out", to)
    assert not certificate["exact"]
    for tensor, one in certificate["tensors"].items():
        assert one["relative_norm"] <= bound, tensor
        assert one["exact"] or one["reasons"], tensor
    model = golden(name)
    expected, _, _ = one_shot(model, model.tokens)
    found = logits(GOLDENS / name, tmp_path / "out")
    per_token = [relative_norm(a, b) for a, b in zip(found[0], expected[0], strict=True)]
    assert 0 < np.median(per_token) <= 40 * max(one["relative_norm"] for one in certificate["tensors"].values())


ROUND_TRIPS = [
    ("v3-fp8-ue8m0", ("bf16", "fp8-ue8m0")),
    ("v3-fp8-ue8m0", ("f32", "bf16", "fp8-ue8m0")),
    ("v3-mtp", ("bf16", "fp8")),  # not exact on the way, and yet
    ("v32-fp8", ("bf16", "fp8-ue8m0")),
    ("v4-flash", ("bf16", "mxfp4")),
    ("v4-flash", ("fp8", "mxfp4")),
    ("v4-flash", ("fp8-ue8m0", "bf16", "mxfp4")),
]


@pytest.mark.parametrize(("name", "steps"), ROUND_TRIPS)
def test_round_trip(name: str, steps: tuple[str, ...], tmp_path: Path) -> None:
    """There and back gives the same bytes, scales included."""
    source = GOLDENS / name
    for i, to in enumerate(steps):
        made(source, tmp_path / str(i), to)
        source = tmp_path / str(i)
    assert tensors(source) == tensors(GOLDENS / name)
    before, after = load_config(GOLDENS / name), load_config(source)
    if isinstance(before, V4Config) and isinstance(
        after, V4Config
    ):  # published files need not say that experts are FP4
        before, after = (dataclasses.replace(c, expert_dtype=None) for c in (before, after))
    assert after == before


def test_kept_alone(tmp_path: Path, v4_folder: Path) -> None:
    """Ids, float32 parameters, drafts and what nobody runs are carried along in all formats, byte for byte."""
    source = Path(shutil.copytree(v4_folder, tmp_path / "source"))
    rewrite(source, put("mtp.0.emb.tok_emb.weight", np.arange(320 * 64, dtype=np.float32).reshape(320, 64)))
    rewrite(source, put("vision.blocks.0.attn.wq_a.weight", np.arange(12, dtype=np.float16).reshape(3, 4)))
    before = tensors(source)
    converted = {row.scale_name(name) for row in table(load_config(source)) for _, name in row.tensors()}
    for to in TARGETS:
        certificate = made(source, tmp_path / to, to)
        after = tensors(tmp_path / to)
        assert certificate["summary"]["unused"]["tensors"] == 2
        for name, one in certificate["tensors"].items():
            if one["class"] in ("integer", "vector", "float32", "unused"):
                assert after[name] == before[name] and one["action"] == "kept", (to, name)
        missing = before.keys() - after.keys() - converted
        assert all(name.endswith(".weight") for name in missing) and (not missing or "4" in to)


def test_only(tmp_path: Path, v4_folder: Path) -> None:
    """Experts alone: the rest stays as it was, and the config says what is left."""
    certificate = made(v4_folder, tmp_path / "out", "bf16", only="*.experts.*")
    assert {one["class"] for one in certificate["tensors"].values() if one["action"] == "converted"} == {"expert"}
    data = json.loads((tmp_path / "out" / "config.json").read_text())
    assert data["quantization_config"]["scale_fmt"] == "ue8m0" and "expert_dtype" not in data
    skipped = data["quantization_config"]["modules_to_not_convert"]
    assert "layers.0.ffn.experts.7.w2" in skipped and not any("attn" in name for name in skipped)
    load(tmp_path / "out", mtp=True)


@pytest.mark.full
def test_only_in_v3(tmp_path: Path) -> None:
    """An FP8 model whose attention is BF16 is read here, too."""
    certificate = made(GOLDENS / "v3-fp8-ue8m0", tmp_path / "out", "bf16", only="*.self_attn.*")
    assert certificate["exact"]
    model = golden("v3-fp8-ue8m0")
    expected, _, _ = one_shot(model, model.tokens)
    assert worst(logits(GOLDENS / "v3-fp8-ue8m0", tmp_path / "out"), expected) <= 1e-5


@pytest.mark.parametrize("to", ["fp8-ue8m0", "bf16"])
def test_names(to: str, tmp_path: Path) -> None:
    """Official names to Hugging Face's modules and back: the same tensors; each form is loaded."""
    settings = {**V4_SETTINGS, "moe_intermediate_size": 128, "n_routed_experts": 4, "num_nextn_predict_layers": 0}
    source = tmp_path / "source"
    synthesise(source, synth_config("deepseek-v4-flash", layers=3, settings=settings))
    for name in (n for row in table(load_config(source)) for _, n in row.tensors()):
        if ".experts." not in name:
            assert official_name(hugging_face_name(name)) == name
    made(source, tmp_path / "plain", to)
    made(source, tmp_path / "hf", to, names="hf")
    found = tensors(tmp_path / "hf")
    assert "model.layers.0.mlp.experts.gate_up_proj" in found and "lm_head.weight" in found
    assert not any(".attn." in name or ".ffn." in name for name in found)
    made(tmp_path / "hf", tmp_path / "back", to, names="official")
    assert tensors(tmp_path / "back") == tensors(tmp_path / "plain")
    made(tmp_path / "hf", tmp_path / "stacked", "f32")  # the source's names are kept: stacks
    assert tensors(tmp_path / "stacked").keys() == {n for n in found if "scale_inv" not in n}
    one, two = (load(tmp_path / f, mtp=False)[1] for f in ("hf", "plain"))
    assert str(one) == str(two)


def test_int4_words_of_stacks_are_refused(tmp_path: Path) -> None:
    from dsjax.errors import InputError

    with pytest.raises(InputError, match="--names official"):
        convert(GOLDENS / "v4-hf-names", tmp_path / "out", Options(TARGETS["int4-group"]))
    made(GOLDENS / "v4-hf-names", tmp_path / "out", "int4-group", names="official")


@pytest.mark.parametrize("to", ["fp8", "fp8-ue8m0"])
def test_dense_fp8_runs(to: str, tmp_path: Path) -> None:
    """A distill in FP8 is loaded as it is stored, and its logits are near those of BF16."""
    synthesise(tmp_path / "model", synth_config("deepseek-r1-distill-llama-8b", layers=2, settings=DENSE_SETTINGS))
    certificate = made(tmp_path / "model", tmp_path / "out", to)
    tokens = np.arange(12, dtype=np.int32)[None]
    found = [own_logits(tmp_path / folder, tokens) for folder in ("model", "out")]
    largest = max(one["relative_norm"] for one in certificate["tensors"].values())
    assert 0.02 < largest < 0.04
    assert 0 < relative_norm(found[1], found[0]) < 4 * largest


INTEGERS = {
    "int8-channel": ("compressed-tensors", "int-quantized", 8, "channel", True),
    "int4-group": ("compressed-tensors", "pack-quantized", 4, "group", False),
    "w4a8": ("compressed-tensors", "pack-quantized", 4, "group", True),
}


@pytest.mark.parametrize("to", INTEGERS)
def test_config_of_integers(to: str, tmp_path: Path) -> None:
    """What loaders of compressed-tensors read, and which modules they must leave alone."""
    made(GOLDENS / "v3-mtp", tmp_path / "out", to)
    method, form, bits, strategy, activations = INTEGERS[to]
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    group = section["config_groups"]["group_0"]
    assert (section["quant_method"], section["format"]) == (method, form)
    assert (group["weights"]["num_bits"], group["weights"]["strategy"]) == (bits, strategy)
    assert group["weights"]["symmetric"] and not group["weights"]["dynamic"]
    assert (group["input_activations"] is not None) == activations
    if activations:
        assert group["input_activations"]["strategy"] == "token" and group["input_activations"]["dynamic"]
    assert "lm_head" in section["ignore"] and "model.layers.1.mlp.gate" in section["ignore"]
    assert "model.embed_tokens" not in section["ignore"]


# --- in Hugging Face -------------------------------------------------------------------------------------------------

HUGGING_FACE = [
    ("v3-fp8-ue8m0", "bf16", None),
    ("v3-mtp", "bf16", None),
    ("v4-flash", "bf16", None),
    ("v4-flash", "bf16", "hf"),
    ("qwen2-untied", "f16", None),
    ("llama-llama3", "bf16", None),
]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "to", "names"), HUGGING_FACE)
def test_hugging_face(name: str, to: str, names: str | None, tmp_path: Path) -> None:
    """Hugging Face reads the folder itself, and gives the logits that are computed from it here."""
    made(GOLDENS / name, tmp_path / "out", to, names=names)
    found = logits(GOLDENS / name, tmp_path / "out")
    theirs = hugging_face_logits(tmp_path / "out", golden(name).tokens)
    assert worst(found, theirs) <= (3e-5 if name.startswith("v4") else BOUND)


def hugging_face_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Of the folder as `from_pretrained` reads it, computed in float32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    network, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        found: np.ndarray = network.float().eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    return found


WHOLE_BLOCKS: dict[str, dict[str, Any]] = {
    "deepseek-v3": {
        **SYNTH_SETTINGS,
        **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank"), 128),
        **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 64),
        "num_nextn_predict_layers": 0,
    },
    "deepseek-v4-flash": {
        **V4_SETTINGS,
        **dict.fromkeys(("hidden_size", "moe_intermediate_size", "q_lora_rank", "o_lora_rank"), 128),
        "head_dim": 64,
        "index_head_dim": 64,
        "num_nextn_predict_layers": 0,
    },
}
"""Hugging Face takes a block's size to be a matrix's over its grid's: only whole blocks, or one, mean what they say."""


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["fp8", "fp8-ue8m0"])
@pytest.mark.parametrize("preset", WHOLE_BLOCKS)
def test_hugging_face_reads_fp8(preset: str, to: str, tmp_path: Path) -> None:
    """Without a GPU for it, it decodes: with powers of two to the same values as everybody.

    With float32 scales it rounds some matrices to bfloat16 and not others: its logits are as near as that is certified.
    """
    pytest.importorskip("accelerate")
    synthesise(tmp_path / "model", synth_config(preset, layers=3, settings=WHOLE_BLOCKS[preset]), template=preset)
    source = tmp_path / "model"
    if to == "fp8" and preset == "deepseek-v3":  # whose own format that is: from BF16 instead
        made(source, tmp_path / "bf16", "bf16")
        shutil.rmtree(tmp_path / "bf16" / CARRIED)
        source = tmp_path / "bf16"
    made(source, tmp_path / "out", to)
    rounding = made(tmp_path / "out", tmp_path / "decoded", "bf16")
    tokens = np.arange(12, dtype=np.int32)[None]
    theirs, ours = hugging_face_logits(tmp_path / "out", tokens), own_logits(tmp_path / "out", tokens)
    if rounding["exact"]:
        assert worst(ours, theirs) <= 3e-5
    else:
        assert (preset, to) == ("deepseek-v3", "fp8")
        certified = max(one["relative_norm"] for one in rounding["tensors"].values())
        assert certified < 2**-8 and relative_norm(ours, theirs) <= 10 * certified
