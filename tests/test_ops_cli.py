"""`dsjax ops`, --op, --op-module and --platform-plugin: what is listed, taken and reported, and what is refused."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import DENSE_SETTINGS, ROOT
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from dsjax.cli.main import build_parser, main
from dsjax.operators import operators
from quant.operator import find

Capture = pytest.CaptureFixture[str]

NORM = '''
"""A vendor's own norm."""
import jax.numpy as jnp
from quant.operator import find

calls = []

@find("rms_norm").variant("{name}", bound=1e-6{platforms})
def norm(x, gain, eps):
    """Divided by a square root, not multiplied with its inverse."""
    calls.append(x.shape)
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * gain * {factor}
'''


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Variants, defaults and the compilation cache are as before after every test."""
    before = {o.name: (dict(o.variants), o.platforms) for o in operators()}
    yield
    for o in operators():
        o.variants, o.platforms = before[o.name]
    jax.config.update("jax_compilation_cache_dir", None)
    reset_cache()


def test_the_page_names_every_verb_that_takes_variants() -> None:
    [verbs] = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    taking = {name for name, verb in verbs.choices.items() if "--op" in verb._option_string_actions} - {"ops"}
    page = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    [told] = re.findall(r"^(.*) take `--op NAME=VARIANT`", page, re.MULTILINE)
    assert {name.removesuffix(" --aot") for name in re.findall(r"`([^`]+)`", told)} == taking


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distill of one layer, whose steps compile fast."""
    folder = tmp_path_factory.mktemp("ops") / "model"
    settings = [part for k, v in DENSE_SETTINGS.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    assert main(["synth", "deepseek-r1-distill-qwen-1.5b", "--layers", "1", "--out", str(folder), *settings]) == 0
    return folder


def module(folder: Path, name: str = "mychip", platforms: str = "", factor: float = 1.0) -> Path:
    """A file that registers a variant of rms_norm."""
    path = folder / f"{name}_kernels.py"
    path.write_text(NORM.format(name=name, platforms=platforms, factor=factor))
    return path


def run(capsys: Capture, *arguments: Any) -> dict[str, Any]:
    """A verb's one JSON object."""
    capsys.readouterr()
    status = main([*(str(a) for a in arguments), "--json"])
    out, err = capsys.readouterr()
    assert status == 0 and len(out.splitlines()) == 1, err
    found: dict[str, Any] = json.loads(out)
    return found


def refused(capsys: Capture, *arguments: Any) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("dsjax: "), err
    return err.removeprefix("dsjax: ").rstrip("\n")


def generate_arguments(model: Path) -> tuple[Any, ...]:
    return ("generate", "--model", model, "--prompt-ids", "5,6,7", "--max-new-tokens", 3, "--dtype", "float32")


def test_the_list_as_json_and_as_text(capsys: Capture) -> None:
    found = run(capsys, "ops", "--platform", "tpu", "--op", "top_k=loop")
    assert found["platform"] == "tpu" and found["platforms"] == ["cpu", "cuda", "tpu", "generic"]
    by_name = {o["name"]: o for o in found["operators"]}
    assert by_name["top_k"]["chosen"] == "loop" and by_name["top_k"]["platforms"]["tpu"] == "chlo"
    assert by_name["block_scaled_dot"]["chosen"] == "form: tiled"
    assert [v["name"] for v in by_name["mla"]["variants"]] == ["auto", "absorbed", "naive"]
    for operator in found["operators"]:
        for variant in operator["variants"]:
            assert variant["says"] and "\n" not in variant["says"] and variant["bound"] >= 0
    assert run(capsys, "ops")["platform"] == "generic"
    assert "mychip" in run(capsys, "ops", "--platform", "mychip")["platforms"]
    assert main(["ops", "--op", "top_k=loop"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("top_k")
    assert lines[at + 1].startswith("    chlo ") and lines[at + 1].endswith("[all]")
    assert lines[at + 3].startswith("  * loop ")
    assert max(map(len, lines)) <= 200


def test_a_lowering_from_outside_is_used_and_reported(model: Path, tmp_path: Path, capsys: Capture) -> None:
    plain = run(capsys, *generate_arguments(model))
    assert plain["operators"] == {}
    given = ("--op-module", module(tmp_path), "--op", "rms_norm=mychip")
    found = run(capsys, *generate_arguments(model), *given)
    assert found["operators"] == {"rms_norm": "mychip"} and found["sequences"] == plain["sequences"]
    own = sys.modules[find("rms_norm").variants["mychip"].body.__module__]
    # Two steps of a layer with two norms, and one at the end; a scan's body is traced once.
    assert len(own.calls) == 2 * 3 and {shape[-1] for shape in own.calls} == {DENSE_SETTINGS["hidden_size"]}
    tokens, out = tmp_path / "tokens.json", tmp_path / "logits.npy"
    tokens.write_text("[[5, 6, 7]]")
    score = ("score", "--model", model, "--tokens", tokens, "--logits", out, "--dtype", "float32")
    assert run(capsys, *score, *given)["operators"] == {"rms_norm": "mychip"}  # the file is not run again
    assert len(own.calls) == 3 * 3 and np.isfinite(np.load(out)).all()
    capsys.readouterr()
    assert main([str(a) for a in (*generate_arguments(model), *given)]) == 0
    assert "dsjax: operators on cpu: rms_norm=mychip" in capsys.readouterr().err


def test_kept_programs_are_of_the_choice_asked_for(model: Path, tmp_path: Path, capsys: Capture) -> None:
    """One compilation cache on disk, one process, and a variant that shows."""
    wrong = ("--op-module", module(tmp_path, "wrong", factor=-1.0), "--op", "rms_norm=wrong")
    cache = ("--compile-cache", tmp_path / "compiled")
    ids = []
    for given in ((), wrong, (), wrong):
        jax.clear_caches()
        found = run(capsys, *generate_arguments(model), *given, *cache)
        ids.append(found["sequences"][0]["output_ids"])
    assert ids[0] == ids[2] != ids[1] == ids[3]
    assert any((tmp_path / "compiled").iterdir())


def test_bench_reports_its_operators(model: Path, capsys: Capture) -> None:
    few = ("--prompt-length", 4, "--new-tokens", 2, "--op", "block_scaled_dot=whole", "--op", "rope=swap")
    found = run(capsys, "bench", "--model", model, *few)
    assert found["operators"] == {"block_scaled_dot": "whole", "rope": "swap"} and found["platform"] == "cpu"


BAD = {
    "no such operator": (("--op", "topk=loop"), "--op topk=loop: operator: expected act_quant, "),
    "no such variant": (("--op", "top_k=heap"), "operator top_k: expected chlo or sort or loop, found heap"),
    "no variant": (("--op", "top_k"), "argument --op: invalid OPERATOR=VARIANT value: 'top_k'"),
    "no module": (("--op-module", "no.such"), "--op-module no.such: expected a module, or a path that ends in .py"),
    "no file": (("--op-module", "no/such.py"), "--op-module no/such.py: expected a file, found none"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("verb", ["ops", "generate"])
def test_what_is_not_there(case: str, verb: str, model: Path, capsys: Capture) -> None:
    flags, message = BAD[case]
    line = refused(capsys, *(("ops",) if verb == "ops" else generate_arguments(model)), *flags)
    assert message in line


MODULES = {
    "raises": ("raise KeyError('x' * 1000)", "KeyError: 'xxx"),
    "imports what is not there": ("import no_such_kernels", "ModuleNotFoundError: No module named 'no_such_kernels'"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "is no Python": ("def", "SyntaxError: invalid syntax"),
    "name taken": (
        "from quant.operator import find\n@find('top_k').variant('loop', bound=0.0)\ndef f(x, k): return x",
        "ValueError: operator top_k: variant loop exists already",
    ),
    "no such variant": (
        "from quant.operator import find\nfind('top_k').take('lop', 'mychip')",
        "ValueError: operator top_k: expected chlo or sort or loop, found lop",
    ),
    "unknown operator": ("from quant.operator import find\nfind('topk')", "ValueError: operator: expected "),
}


@pytest.mark.parametrize("case", MODULES)
def test_a_module_that_fails(case: str, tmp_path: Path, capsys: Capture) -> None:
    source, message = MODULES[case]
    path = tmp_path / "kernels.py"
    path.write_text(source)
    for _ in range(2):  # it is not left half imported
        line = refused(capsys, "ops", "--op-module", path)
        assert line.startswith(f"--op-module {path}: {message}") and len(line) < 800


def test_a_module_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    module(tmp_path, "named", platforms=', platforms=["mychip"]')
    monkeypatch.syspath_prepend(tmp_path)
    found = run(capsys, "ops", "--op-module", "named_kernels", "--platform", "mychip")
    (norm,) = [o for o in found["operators"] if o["name"] == "rms_norm"]
    assert norm["chosen"] == norm["platforms"]["mychip"] == "named" and norm["platforms"]["cpu"] == "lax"
    (variant,) = [v for v in norm["variants"] if v["name"] == "named"]
    assert variant["says"] == "Divided by a square root, not multiplied with its inverse."
    assert variant["from"] == "named_kernels" and variant["bound"] == 1e-6


def test_a_variant_that_cannot_compute_a_model(tmp_path: Path, capsys: Capture) -> None:
    """Experts in integers, and a variant for floats."""
    from helpers import SYNTH_SETTINGS

    settings = [part for k, v in SYNTH_SETTINGS.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    assert main(["synth", "deepseek-v3", "--layers", "2", "--out", str(tmp_path / "v3"), *settings]) == 0
    flags = ("--weights", "w8a8", "--op", "grouped_matmul=ragged")
    line = refused(capsys, *generate_arguments(tmp_path / "v3"), *flags)
    assert line == "--op: operator grouped_matmul: variant ragged: expected float activations, found INT8"


def test_plan_takes_choices_for_the_compiler_only(capsys: Capture) -> None:
    line = refused(capsys, "plan", "deepseek-v3", "--cards", 8, "--memory", "96GB", "--op", "top_k=loop")
    assert line.startswith("--op: expected --aot")


# --- plugins ---------------------------------------------------------------------------------------------------------


def test_a_plugin_needs_a_name_and_a_file(tmp_path: Path, capsys: Capture) -> None:
    none = tmp_path / "none.so"
    line = refused(capsys, "inspect", "deepseek-v3", "--platform-plugin", none)
    assert line == f"--platform-plugin {none}: expected --platform, its name, found none"
    line = refused(capsys, "inspect", "deepseek-v3", "--platform", "mychip", "--platform-plugin", none)
    assert line == f"--platform-plugin {none}: expected a plugin's shared library, found no file"
    for name in ("cpu", "my,chip", "2chips"):
        line = refused(capsys, "inspect", "deepseek-v3", "--platform", name, "--platform-plugin", none)
        assert line.startswith(f"--platform {name}: expected another name for a plugin")
    none.write_bytes(b"")
    line = refused(capsys, "inspect", "deepseek-v3", "--platform", "mychip", "--platform-plugin", none)
    assert line.startswith(f"--platform-plugin {none}: expected it before JAX starts")


def alone(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """A verb in a process of its own, where JAX has not started."""
    command = [sys.executable, "-m", "dsjax", *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.parametrize("kind", ["text", "a library that is no plugin"])
def test_a_plugin_that_is_none(kind: str, tmp_path: Path) -> None:
    library = tmp_path / "plugin.so"
    library.write_text("no library")
    if kind != "text":
        found = [f for f in Path(sys.base_prefix, "lib").rglob("*.so") if "dynload" in str(f.parent)]
        if not found:
            pytest.skip("no library at hand")
        library = found[0]
    result = alone("inspect", "deepseek-v3", "--platform", "mychip", "--platform-plugin", library)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(f"dsjax: --platform-plugin {library}: expected a PJRT plugin: ")
    assert "Traceback" not in result.stderr


def plugin() -> Path | None:
    """The library of pip's xla-cpu-pjrt, if it is installed."""
    if importlib.util.find_spec("xla_plugins") is None:
        return None
    spec = importlib.util.find_spec("xla_plugins.xla_cpu_pjrt")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((f for folder in folders for f in Path(folder).glob("*.so")), None)


@pytest.mark.skipif(plugin() is None, reason="xla-cpu-pjrt is not installed")
def test_a_model_on_a_plugin(model: Path, tmp_path: Path, capsys: Capture) -> None:
    """End to end: the plugin's name is whose defaults are taken and reported, whatever its client calls itself."""
    plain = run(capsys, *generate_arguments(model))
    kernels = module(tmp_path, platforms=', platforms=["mychip"]')
    flags = ("--platform", "mychip", "--platform-plugin", plugin(), "--op-module", kernels, "--op", "top_k=sort")
    result = alone(*generate_arguments(model), *flags, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["sequences"] == plain["sequences"]
    assert found["operators"].keys() == {o.name for o in operators()}
    assert found["operators"]["rms_norm"] == "mychip" and found["operators"]["top_k"] == "sort"
    assert found["operators"]["block_scaled_dot"] == "form: fused" and found["operators"]["rope"] == "lax"
    assert "experimental" not in result.stderr and "Traceback" not in result.stderr
