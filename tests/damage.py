"""What tests of bad input share: damaging a checkpoint, and commands that must fail as the contract says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsjax.checkpoint.safetensors import INDEX_FILE, Files
from dsjax.checkpoint.safetensors_writer import Spec, write_checkpoint_files
from dsjax.cli.main import main

Capture = pytest.CaptureFixture[str]
Tensors = dict[str, np.ndarray]


def settings(values: dict[str, Any]) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def refused(capsys: Capture, arguments: list[Any], *names: str) -> str:
    """Runs a command that must fail as the contract says; the message must hold all of `names`."""
    capsys.readouterr()
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert status == 2, (status, out, err)
    assert out == ""
    assert err.endswith("\n") and len(err.splitlines()) == 1, err
    assert err.startswith("dsjax: ") and "Traceback" not in err
    assert len(err) < 1500
    for name in names:
        assert name in err, f"{name!r} not in {err!r}"
    return err


def rewrite(folder: Path, change: Callable[[Tensors], None], shard_bytes: int = 1 << 40) -> None:
    """Writes the checkpoint's tensors anew after `change`, headers and index consistent with them."""
    with Files.open(folder) as files:
        tensors = {name: np.array(files.read(name)) for name in files}
    for path in [*folder.glob("*.safetensors"), folder / INDEX_FILE]:
        path.unlink(missing_ok=True)
    change(tensors)
    specs = [Spec(name, array.dtype, array.shape) for name, array in tensors.items()]
    write_checkpoint_files(folder, specs, tensors.values(), shard_bytes=shard_bytes)


def edit_json(path: Path, **changes: Any) -> None:
    """Sets fields of a JSON file; the value `...` deletes one."""
    data = json.loads(path.read_text()) if path.is_file() else {}
    data |= {k: v for k, v in changes.items() if v is not ...}
    for key in [k for k, v in changes.items() if v is ...]:
        del data[key]
    path.write_text(json.dumps(data))


def save_tokens(folder: Path, rows: Any = ((1, 2, 3),)) -> Path:
    path = folder / "tokens.json"
    path.write_text(json.dumps(rows))
    return path


def score_arguments(model: Path, folder: Path, *extra: Any) -> list[Any]:
    return ["score", "--model", model, "--tokens", save_tokens(folder), "--logits", folder / "out.npy", *extra]


def generate_arguments(model: Path, *extra: Any) -> list[Any]:
    return ["generate", "--model", model, "--prompt-ids", "1,2", "--max-new-tokens", "2", *extra]


def refused_everywhere(capsys: Capture, model: Path, tmp_path: Path, *names: str) -> None:
    """Checkpoint damage: generate and score refuse it, and `inspect --check` gives a negative verdict."""
    refused(capsys, generate_arguments(model), *names)
    refused(capsys, score_arguments(model, tmp_path), *names)
    assert not (tmp_path / "out.npy").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "tokens.json"]
    assert main(["inspect", str(model), "--check", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["problems"]
    for name in names:
        assert name in err


def poke(name: str, value: Any) -> Callable[[Tensors], None]:
    """Puts a value into the last element; an int is put as a byte pattern."""

    def change(tensors: Tensors) -> None:
        array = tensors[name]
        if isinstance(value, int):
            array.reshape(-1).view(np.uint8)[-1] = value
        else:
            array.reshape(-1)[-1] = value

    return change


def drop(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def replace(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: function(tensors[name])})


def put(name: str, array: np.ndarray) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: array})
