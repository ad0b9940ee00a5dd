"""What a conversion plans and says: stacks of experts under any name, and the config.json of what is left in floats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import Tensors, rewrite
from helpers import DENSE_SETTINGS, GOLDENS, SYNTH_SETTINGS, V4_SETTINGS
from test_convert_load import made, tensors

from dsjax.checkpoint.load import load
from dsjax.config import load_config
from dsjax.convert import TARGETS, Options, convert
from dsjax.convert.plan import CARRIED
from dsjax.errors import InputError
from dsjax.params import leaves
from dsjax.synth import synth_config, synthesise

EXPERTS = 3
STACKS = ("gate_up_proj", "down_proj")


def v4(folder: Path, width: int, experts: int = EXPERTS) -> Path:
    """A V4 of one layer with FP4 experts of this width, under DeepSeek's names."""
    settings = {
        **V4_SETTINGS,
        "moe_intermediate_size": width,
        "n_routed_experts": experts,
        "num_experts_per_tok": 1,
        "num_nextn_predict_layers": 0,
    }
    synthesise(folder, synth_config("deepseek-v4-flash", layers=1, settings=settings))
    return folder


@pytest.fixture(scope="module")
def fp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return v4(tmp_path_factory.mktemp("v4") / "model", 128)


@pytest.fixture(scope="module")
def stacked(fp4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in BF16, in stacks."""
    out = tmp_path_factory.mktemp("stacked") / "model"
    made(fp4, out, "bf16", names="hf")
    shutil.rmtree(out / CARRIED)
    return out


def fails(source: Path, out: Path, to: str, *words: str, only: str | None = None, names: str | None = None) -> None:
    """Refused, with these words in one line, before anything is written."""
    with pytest.raises(InputError) as error:
        convert(source, out, Options(TARGETS[to], only, names))
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line
    assert not out.exists() and not out.with_name(f".{out.name}.partial").exists()


def section(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def resident(folder: Path) -> dict[Any, np.ndarray]:
    params = load(folder, mtp=False, weights="float32")[1]
    return {row.path: np.asarray(leaf) for row, leaf in leaves(params, load_config(folder))}


def same_weights(one: Path, other: Path) -> None:
    first, second = resident(one), resident(other)
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path], err_msg=str(path))


# --- stacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["fp8-ue8m0", "fp8", "bf16"])
def test_scales_of_two_types_make_no_stack(to: str, fp4: Path, tmp_path: Path) -> None:
    """Bytes of float32 are no E8M0: such experts stay apart, whatever becomes of them."""
    source = tmp_path / "source"
    made(fp4, source, "fp8-ue8m0")
    shutil.rmtree(source / CARRIED)
    name = "layers.0.ffn.experts.1.w2"

    def widen(found: Tensors) -> None:
        found[f"{name}.scale"] = found[f"{name}.scale"].astype(np.float32)

    rewrite(source, widen)
    fails(source, tmp_path / "out", to, "down_proj", "one format", name, names="hf")
    made(source, tmp_path / "out", to)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "official": lambda name: name.replace("model.layers.", "layers.").replace(".mlp.", ".ffn."),
    "weight": lambda name: name + ".weight",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_stacks_under_other_names(spelling: str, stacked: Path, tmp_path: Path) -> None:
    """Every matrix of a stack has an entry of its own, and the result is the same stack."""
    source = Path(shutil.copytree(stacked, tmp_path / "source"))

    def respell(found: Tensors) -> None:
        for name in [n for n in found if n.endswith(STACKS)]:
            found[SPELLINGS[spelling](name)] = found.pop(name)

    rewrite(source, respell)
    for to in ("f32", "mxfp4", "fp8"):
        certificate = made(source, tmp_path / to, to)
        entries = [name for name, one in certificate["tensors"].items() if one["class"] == "expert"]
        assert sorted(entries) == sorted(
            f"layers.0.ffn.experts.{e}.{w}.weight" for e in range(EXPERTS) for w in ("w1", "w2", "w3")
        )
        assert tensors(source).keys() <= tensors(tmp_path / to).keys()
        load(tmp_path / to)
    same_weights(tmp_path / "f32", stacked)
    fails(source, tmp_path / "int", "int8-channel", "--names official")


def test_a_stack_of_one_expert(tmp_path: Path) -> None:
    """Has its axis of experts."""
    source = v4(tmp_path / "source", 128, experts=1)
    for to, only in (("bf16", None), ("fp8", None), ("fp8-ue8m0", "*.attn.*")):
        out = tmp_path / f"{to}-out"
        made(source, out, to, only=only, names="hf")
        load(out)
    same_weights(source, tmp_path / "bf16-out")
    found = tensors(tmp_path / "bf16-out")
    assert len(found["model.layers.0.mlp.experts.down_proj"][1]) == 64 * 128 * 2


def test_no_block_holds_gate_and_up(tmp_path: Path) -> None:
    """Neither where experts are kept nor where a stack is the source."""
    source = v4(tmp_path / "source", 96)
    made(source, tmp_path / "fp8", "fp8")
    fails(tmp_path / "fp8", tmp_path / "out", "fp8", "--names hf", "multiple of 128, found 96", names="hf")
    fails(tmp_path / "fp8", tmp_path / "out", "bf16", "--names hf", "128", only="*.attn.*", names="hf")
    made(source, tmp_path / "stacks", "bf16", names="hf")
    fails(tmp_path / "stacks", tmp_path / "out", "fp8", "--to fp8: ", "--names official")
    made(tmp_path / "stacks", tmp_path / "apart", "fp8", names="official")
    made(tmp_path / "stacks", tmp_path / "out", "mxfp4")


# --- what is said of it ----------------------------------------------------------------------------------------------


def test_lists_of_floats_have_the_head(fp4: Path, tmp_path: Path) -> None:
    """A list takes the place of the one that loaders have by themselves."""
    made(GOLDENS / "v3-fp8-ue8m0", tmp_path / "v3", "bf16", only="*.self_attn.*")
    assert section(tmp_path / "v3")["modules_to_not_convert"][0] == "lm_head"
    for names, head in ((None, "head"), ("hf", "lm_head")):
        out = tmp_path / f"v4-{names}"
        made(fp4, out, "bf16", only="*.attn.*", names=names)
        assert section(out)["modules_to_not_convert"].count(head) == 1
    made(GOLDENS / "v3-bf16", tmp_path / "block", "int8-block", only="*.mlp.*")
    assert section(tmp_path / "block")["ignored_layers"][0] == "lm_head"
    settings = {**DENSE_SETTINGS, "tie_word_embeddings": True}
    synthesise(tmp_path / "tied", synth_config("deepseek-r1-distill-qwen-1.5b", layers=1, settings=settings))
    for to, key in (("int8-channel", "ignore"), ("fp8", "modules_to_not_convert")):
        made(tmp_path / "tied", tmp_path / to, to)
        assert section(tmp_path / to)[key] == ["lm_head"]
        load(tmp_path / to)


def test_powers_of_two_are_said_of_all_scales_or_not(tmp_path: Path) -> None:
    """Some matrices kept their float32 scales: activations need not have powers of two either."""
    synthesise(tmp_path / "model", synth_config("deepseek-v3", layers=2, settings=SYNTH_SETTINGS))
    assert "scale_fmt" not in section(tmp_path / "model")
    made(tmp_path / "model", tmp_path / "some", "fp8-ue8m0", only="*.self_attn.*")
    assert "scale_fmt" not in section(tmp_path / "some")
    made(tmp_path / "model", tmp_path / "all", "fp8-ue8m0")
    assert section(tmp_path / "all")["scale_fmt"] == "ue8m0"
    made(tmp_path / "all", tmp_path / "again", "fp8-ue8m0", only="*.self_attn.*")
    assert section(tmp_path / "again")["scale_fmt"] == "ue8m0"


def test_only_must_match_what_is_converted(tmp_path: Path) -> None:
    source = GOLDENS / "v3-fp8-ue8m0"
    for to, only in (("fp8-ue8m0", "model.norm.weight"), ("int8-channel", "lm_head.weight"), ("bf16", "*.e_score*")):
        fails(source, tmp_path / "out", to, f"--only {only}", f"that --to {to} converts", only=only)
