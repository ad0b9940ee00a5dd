"""The command line: JSON, round trips, determinism, stopping, batches, streaming, fidelity to Hugging Face."""

from __future__ import annotations

import filecmp
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import DENSE_SETTINGS, SYNTH_SETTINGS, V3_NAMES, V4_SETTINGS, V32_SETTINGS, worst
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from test_goldens import BOUND, V4_BOUND

from dsjax import bandwidth
from dsjax.chat import chat_encoding
from dsjax.chat.template import find_template
from dsjax.chat.tokens import USER
from dsjax.checkpoint.safetensors import Files
from dsjax.cli.main import main
from dsjax.config import parse_config
from dsjax.presets import PRESETS
from dsjax.synth import synth_config
from dsjax.text import load_text

GOLDENS = Path(__file__).parent / "goldens"
Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *arguments: Any) -> dict[str, Any]:
    """Runs a verb with --json: status 0, and one JSON object as all of standard output."""
    capsys.readouterr()
    status = main([*(str(a) for a in arguments), "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert out.endswith("\n") and len(out.splitlines()) == 1, out
    result = json.loads(out)
    assert isinstance(result, dict)
    return result


def synth(out: Path, preset: str = "deepseek-v3", *extra: str, layers: int = 2, **changes: Any) -> Path:
    families = {"deepseek-v4": V4_SETTINGS, "deepseek-v3.2": V32_SETTINGS, "deepseek-r1-distill": DENSE_SETTINGS}
    base = next((v for k, v in families.items() if preset.startswith(k)), SYNTH_SETTINGS)
    settings = [part for k, v in (base | changes).items() for part in ("--set", f"{k}={json.dumps(v)}")]
    assert main(["synth", preset, "--layers", str(layers), "--out", str(out), *settings, *extra]) == 0
    return out


def generate(capsys: Capture, model: Path, *arguments: Any) -> list[dict[str, Any]]:
    return run(capsys, "generate", "--model", model, *arguments)["sequences"]


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | changes))


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Equal programs are compiled once, through the flag's own means; switched off afterwards."""
    folder = tmp_path_factory.mktemp("compiled")
    assert main(["inspect", "deepseek-v3", "--compile-cache", str(folder)]) == 0
    yield folder
    jax.config.update("jax_compilation_cache_dir", None)
    reset_cache()  # else it stays in use


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="session")
def r1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth(tmp_path_factory.mktemp("cli") / "r1", "deepseek-r1")


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_v3(capsys: Capture) -> None:
    result = run(capsys, "inspect", "deepseek-v3")
    expected = {
        "parameters": 671026419200,
        "active_parameters": 36625618432,
        "mtp_parameters": 11610068224,
        "bytes": 688574839360,
        "kv_bytes_per_token": 70272,
    }
    assert result == {"model": "deepseek-v3", "model_type": "deepseek_v3"} | expected
    assert main(["inspect", "deepseek-v3"]) == 0
    assert "671,026,419,200" in capsys.readouterr().out


@pytest.mark.parametrize("name", V3_NAMES)
def test_goldens_are_sound(name: str, capsys: Capture) -> None:
    result = run(capsys, "inspect", GOLDENS / name, "--check")
    assert result["problems"] == []
    with Files.open(GOLDENS / name) as files:
        assert result["bytes"] == sum(files[n].nbytes for n in files)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepseek-v4-flash", (284332240471, 13270101591, 6610048891, 159609485896, 3509)),
        ("deepseek-v4-pro", (1572997201763, 48852402019, 25840145979, 864704792696, 5024)),
    ],
)
def test_inspect_v4(name: str, expected: tuple[int, ...], capsys: Capture) -> None:
    """Spec V4 7; test_full_size derives the bytes."""
    keys = ("parameters", "active_parameters", "mtp_parameters", "bytes", "kv_bytes_per_token")
    result = run(capsys, "inspect", name)
    assert tuple(result[k] for k in keys) == expected and result["model_type"] == "deepseek_v4"


# --- synth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "layers"),
    [
        ("deepseek-v3", 2),
        ("deepseek-v3.2", 3),
        ("deepseek-r1-distill-qwen-1.5b", 2),
        pytest.param("deepseek-r1-distill-llama-8b", 2, marks=pytest.mark.full),
    ],
)
def test_round_trip(preset: str, layers: int, tmp_path: Path, capsys: Capture) -> None:
    """Made, checked, run, and scored, by the MTP module too where there is one."""
    folder = synth(tmp_path / "below" / "model", preset, layers=layers)  # parents are made
    assert folder.stat().st_mode & 0o777 == 0o755
    checked = run(capsys, "inspect", folder, "--check")
    mtp = "distill" not in preset
    assert checked["problems"] == [] and (checked["mtp_parameters"] > 0) == mtp
    sequences = generate(capsys, folder, "--prompt", "hello", "--max-new-tokens", 3, "--dtype", "float32")
    assert [set(s) for s in sequences] == [{"prompt_ids", "output_ids", "text", "finish_reason"}]
    ids = sequences[0]["prompt_ids"] + sequences[0]["output_ids"]
    (tmp_path / "tokens.json").write_text(json.dumps([ids]))
    result = run(
        capsys,
        *("score", "--model", folder, "--tokens", tmp_path / "tokens.json", "--dtype", "float32"),
        *("--logits", tmp_path / "logits.npy", *(("--mtp-logits", tmp_path / "mtp.npy") if mtp else ())),
    )
    assert result == {"logits": str(tmp_path / "logits.npy"), "shape": [1, len(ids), 320], "operators": {}}
    logits = np.load(tmp_path / "logits.npy")
    assert logits.dtype == np.float32 and logits.shape == (1, len(ids), 320)
    if mtp:
        drafts = np.load(tmp_path / "mtp.npy")
        assert drafts.shape == (1, len(ids) - 1, 320) and np.isfinite(drafts).all()
    text = load_text(folder)
    assert text is not None
    start = len(sequences[0]["prompt_ids"])
    greedy = logits[0, start - 1 : -1, : text.size].argmax(-1).tolist()
    assert greedy == sequences[0]["output_ids"]  # greedy decoding takes what score says is largest


def test_synth_is_deterministic(model: Path, tmp_path: Path) -> None:
    again, other = synth(tmp_path / "again"), synth(tmp_path / "other", "deepseek-v3", "--seed", "1")
    names = sorted(p.name for p in model.iterdir())
    assert names == sorted(p.name for p in again.iterdir())
    assert filecmp.cmpfiles(model, again, names, shallow=False) == (names, [], [])
    same, different, _ = filecmp.cmpfiles(model, other, names, shallow=False)
    assert different == [n for n in names if n.endswith(".safetensors")]
    assert "config.json" in same and "tokenizer.json" in same


def test_values_do_not_depend_on_depth(model: Path, tmp_path: Path) -> None:
    deeper = synth(tmp_path / "deeper", layers=3, first_k_dense_replace=1)
    with Files.open(model) as a, Files.open(deeper) as b:
        common = [n for n in a if n in b and "layers.2." not in n]  # layer 2 is the shallow one's MTP module
        assert len(common) > 50
        for name in common:
            np.testing.assert_array_equal(a.read(name).view(np.uint8), b.read(name).view(np.uint8), err_msg=name)
        for name in ("embed_tokens.weight", "shared_head.head.weight"):
            x, y = a.read(f"model.layers.2.{name}"), b.read(f"model.layers.3.{name}")
            np.testing.assert_array_equal(x.view(np.uint16), y.view(np.uint16))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_made(preset: str, tmp_path: Path, capsys: Capture) -> None:
    extra = {"q_lora_rank": None, "n_group": 1} if preset == "deepseek-v2-lite" else {}
    folder = synth(tmp_path / "model", preset, **extra)
    assert run(capsys, "inspect", folder, "--check")["problems"] == []
    with Files.open(folder) as files:
        scales = [np.array(files.read(n)) for n in files if n.endswith(("_scale_inv", ".scale"))]
    assert bool(scales) == (preset != "deepseek-v2-lite" and "distill" not in preset)
    pow2 = all(bool((np.frexp(s.astype(np.float32))[0] == 0.5).all()) for s in scales)
    assert pow2 == (preset not in ("deepseek-v3", "deepseek-r1"))
    template = find_template(load_text(folder) or pytest.fail("no tokenizer"))
    coded = preset.startswith(("deepseek-v3.2", "deepseek-v4"))
    assert (template is None) == coded == (folder / "encoding").is_dir()


def test_depth_of_v4(tmp_path: Path) -> None:
    """The published schedule cut or continued; one scored layer remains; values do not depend on depth."""
    for name, layers, ratios, hashed in (
        ("deepseek-v4-flash", 1, [0, 0], 0),
        ("deepseek-v4-flash", 3, [0, 0, 4, 0], 2),
        ("deepseek-v4-pro", 5, [128, 128, 4, 128, 4, 0], 3),
        ("deepseek-v4-flash", 46, [0, 0, *[4, 128] * 22, 0], 3),
        ("deepseek-v4-pro", 62, [128, 128, *[4, 128] * 30, 0], 3),
    ):
        config = synth_config(name, layers=layers)
        assert (config["compress_ratios"], config["num_hash_layers"]) == (ratios, hashed)
        parse_config(config)
    shallow, deep = (synth(tmp_path / str(n), "deepseek-v4-flash", layers=n, num_hash_layers=2) for n in (3, 4))
    with Files.open(shallow) as a, Files.open(deep) as b:
        assert set(a) < set(b)
        for name in a:
            np.testing.assert_array_equal(a.read(name).view(np.uint8), b.read(name).view(np.uint8), err_msg=name)


# --- generate: when to stop ------------------------------------------------------------------------------------------

PROMPT = ("--prompt-ids", "5,6,7", "--max-new-tokens", "6")


@pytest.mark.parametrize("where", ["config", "config list", "generation_config", "tokenizer_config"])
def test_stops_at_the_end_token(where: str, model: Path, tmp_path: Path, capsys: Capture) -> None:
    (free,) = generate(capsys, model, *PROMPT)
    assert free["finish_reason"] == "length" and len(free["output_ids"]) == 6
    stop = free["output_ids"][3]
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    text = load_text(folder)
    assert text is not None
    if where.startswith("config"):
        edit_json(folder / "config.json", eos_token_id=[1, stop] if "list" in where else stop)
    elif where == "generation_config":
        edit_json(folder / "generation_config.json", eos_token_id=[stop])
    else:
        edit_json(folder / "tokenizer_config.json", eos_token=text.tokenizer.id_to_token(stop))
    (stopped,) = generate(capsys, folder, *PROMPT)
    first = free["output_ids"].index(stop)
    assert stopped["output_ids"] == free["output_ids"][:first]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == text.decode(stopped["output_ids"])


def test_stops_at_max_length(model: Path, capsys: Capture) -> None:
    """--max-length bounds prompt and output together."""
    (free,) = generate(capsys, model, *PROMPT)
    (short,) = generate(capsys, model, *PROMPT, "--max-length", 5)
    assert short["finish_reason"] == "length"
    assert short["output_ids"] == free["output_ids"][:2]


# --- generate: batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [(), ("--temperature", "0.8", "--top-p", "0.9", "--top-k", "50", "--seed", "7")])
def test_a_batch_equals_each_alone(sampling: tuple[str, ...], model: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "The fox"},
        {"ids": [9]},
        {"messages": [{"role": "user", "content": "why?"}]},
        {"ids": list(range(40, 56))},
        {"prompt": "a\u2028b"},
    ]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8")
    arguments = ("--prompts", path, "--max-new-tokens", 5, "--dtype", "float32", "--max-length", 24, *sampling)
    together = generate(capsys, model, *arguments)
    assert len(together) == 5
    assert together == generate(capsys, model, *arguments, "--batch", 1)
    text = load_text(model)
    assert text is not None
    assert together[0]["prompt_ids"] == text.encode("The fox")
    assert together[1]["prompt_ids"] == [9] and together[1].keys() == together[3].keys() == together[0].keys()
    assert together[2]["prompt_ids"][0] == text.bos
    assert {"reasoning", "content", "tool_calls"} <= together[2].keys() - together[0].keys()
    assert together[4]["prompt_ids"] == text.encode("a\u2028b")
    if sampling:
        other = generate(capsys, model, *arguments[:-1], 8)
        assert [s["output_ids"] for s in other] != [s["output_ids"] for s in together]
    else:
        path.write_text(json.dumps(lines[3]))
        assert generate(capsys, model, *arguments) == [together[3]]


def test_chat_with_a_think_block(r1: Path, capsys: Capture) -> None:
    arguments = ("--prompt", "why?", "--chat", "--max-new-tokens", 4)
    (sequence,) = generate(capsys, r1, *arguments)
    text = load_text(r1)
    assert text is not None
    shown = text.tokenizer.decode(sequence["prompt_ids"], skip_special_tokens=False)
    assert shown == chat_encoding(text, "deepseek_v3", r1).encode([{"role": "user", "content": "why?"}])
    assert shown.endswith(f"{USER}why?<｜Assistant｜><think>\n")
    assert sequence["reasoning"] == sequence["text"].strip()  # never closed in 4 tokens
    assert (sequence["content"], sequence["tool_calls"]) == ("", [])


# --- generate: what is shown -----------------------------------------------------------------------------------------


def test_streamed_text_is_the_text(model: Path, capsys: Capture) -> None:
    arguments = ("--prompt", "hello", "--max-new-tokens", "24", "--temperature", "1.5", "--seed", "3")
    (sequence,) = generate(capsys, model, *arguments)
    assert main(["generate", "--model", str(model), *arguments]) == 0
    out, err = capsys.readouterr()
    assert out == sequence["text"] + "\n"
    assert "time to first token" in err and len(err.splitlines()) == 1


def test_several_prompts_are_numbered(model: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"ids": [5]}\n{"ids": [6]}\n')
    arguments = ("--prompts", str(path), "--max-new-tokens", "2")
    sequences = generate(capsys, model, *arguments)
    assert main(["generate", "--model", str(model), *arguments]) == 0
    expected = "".join(f"[{i}] {s['text']}\n" for i, s in enumerate(sequences))
    assert capsys.readouterr().out == expected


def test_without_a_tokenizer(capsys: Capture) -> None:
    folder = GOLDENS / "v3-bf16"
    arguments = ("--prompt-ids", "1,2,3", "--max-new-tokens", "4")
    (sequence,) = generate(capsys, folder, *arguments)
    assert sequence["prompt_ids"] == [1, 2, 3] and sequence["text"] is None
    assert len(sequence["output_ids"]) == 4 or sequence["finish_reason"] == "stop"
    assert main(["generate", "--model", str(folder), *arguments]) == 0
    assert capsys.readouterr().out == ",".join(map(str, sequence["output_ids"])) + "\n"


def test_ids_beyond_the_tokenizer_are_never_drawn(tmp_path: Path, capsys: Capture) -> None:
    """A vocabulary of 9000 has 8192 or fewer tokens; the rest is padding (spec V3 8)."""
    folder = synth(tmp_path / "model", vocab_size=9000)
    text = load_text(folder)
    assert text is not None and text.size <= 8192
    arguments = ("--prompt-ids", "1", "--max-new-tokens", 60, "--temperature", 1e6)
    (sequence,) = generate(capsys, folder, *arguments)
    assert max(sequence["output_ids"]) < text.size


# --- score and bench -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("v3-mtp", BOUND),
        ("v2-lite", BOUND),
        ("qwen2-tied", BOUND),
        pytest.param("v32-fp8", BOUND, marks=pytest.mark.full),
        ("v4-base", V4_BOUND),
    ],
)
def test_score_equals_hugging_face(name: str, bound: float, tmp_path: Path, capsys: Capture) -> None:
    reference = np.load(GOLDENS / name / "reference.npz")
    np.save(tmp_path / "tokens.npy", reference["tokens"])
    arguments = ["score", "--model", GOLDENS / name, "--tokens", tmp_path / "tokens.npy", "--dtype", "float32"]
    arguments += ["--logits", tmp_path / "logits.npy"]
    pairs = [("logits.npy", "logits")]
    if "mtp_logits" in reference:
        arguments += ["--mtp-logits", tmp_path / "mtp.npy"]
        pairs.append(("mtp.npy", "mtp_logits"))
    run(capsys, *arguments)
    for file, key in pairs:
        found, expected = np.load(tmp_path / file), reference[key]
        assert found.dtype == np.float32 and found.shape == expected.shape
        assert worst(found, expected) <= bound, file
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["tokens.npy", *(f for f, _ in pairs)])


BENCHED = [
    "deepseek-v3",
    "deepseek-r1-distill-llama-8b",
    pytest.param("deepseek-r1-distill-qwen-1.5b", marks=pytest.mark.full),
    pytest.param("deepseek-v3.2", marks=pytest.mark.full),
]


@pytest.mark.parametrize("preset", BENCHED)
def test_bench(preset: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    model = synth(tmp_path / "model", preset)
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 1 << 20)
    result = run(capsys, "bench", "--model", model, "--prompt-length", 8, "--new-tokens", 3, "--batch", 2)
    for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s", "tpot_s", "load_s", "compile_s"):
        assert isinstance(result[key], float) and result[key] > 0, key
    assert result["peak_rss_bytes"] > 0 and result["load_bytes"] > 0
    assert (result["batch"], result["prompt_length"], result["new_tokens"]) == (2, 8, 3)
    assert result["platform"] == "cpu"


# --- the process -----------------------------------------------------------------------------------------------------


def test_module_runs() -> None:
    command = [sys.executable, "-m", "dsjax"]
    result = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stderr == ""
    for verb in ("synth", "inspect", "generate", "chat", "score", "bench"):
        assert verb in result.stdout


@pytest.mark.parametrize("verb", ["synth", "inspect", "generate", "chat", "score", "bench"])
def test_help_of_every_verb(verb: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: dsjax {verb}") and err == ""


def test_reader_that_goes_away() -> None:
    """`dsjax inspect ... | head -0` says nothing."""
    command = f"{sys.executable} -m dsjax inspect deepseek-v3 | head -c 0"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert result.stderr == "" and result.stdout == ""
