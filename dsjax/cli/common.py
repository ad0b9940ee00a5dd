"""What the verbs share: a model's flags, the ids that end a sequence, and where notes and results go."""

from __future__ import annotations

import argparse
import json
import os
import reprlib
import sys
from pathlib import Path
from typing import Any

import jax

from dsjax.config import Config, load_config, read_json_object, token_ids
from dsjax.errors import InputError
from dsjax.layout import layout
from dsjax.numerics import Numerics
from dsjax.parallel import Parallel, load_onto, parallel
from dsjax.params import Tree
from dsjax.plan import Load
from dsjax.plan import load_model as planned_model
from dsjax.plan.check import check_memory
from dsjax.sampling import GREEDY_BELOW, Sampling
from dsjax.text import Text
from sharding import Plan


def positive(text: str) -> int:
    """A flag's number."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "positive integer"


def seed(text: str) -> int:
    """A flag's seed."""
    value = int(text)
    if not 0 <= value < 1 << 63:
        raise ValueError
    return value


seed.__name__ = "integer from 0 to 2^63 - 1"


def print_json(result: dict[str, Any]) -> None:
    """The one line of --json."""
    print(json.dumps(result), flush=True)


def note(text: str) -> None:
    """What is not a result goes to standard error; of several processes the first speaks."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def show_progress() -> bool:
    """Whether somebody looks at standard error; of several processes the first speaks."""
    return sys.stderr.isatty() and jax.process_index() == 0


def numerics_of(options: argparse.Namespace) -> Numerics:
    """The flags --numerics, --dtype, --mla and --kv."""
    return Numerics(options.numerics, options.dtype, options.mla, kv=options.kv)


def _generation_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "generation_config.json"
    return path, read_json_object(path) if path.is_file() else {}


def _suggested(folder: Path) -> dict[str, Any]:
    """The settings of sampling that a checkpoint suggests: none, unless its generation_config.json has `do_sample`.

    Raises:
      InputError: naming the file and the setting that is wrong.
    """
    path, settings = _generation_config(folder)
    sampled = settings.get("do_sample")
    if not isinstance(sampled, bool | None):
        raise InputError(f"{path}: do_sample: expected true or false, found {reprlib.repr(sampled)}")
    if not sampled:
        return {}
    found: dict[str, Any] = {"temperature": 1.0}
    for name in ("temperature", "top_p", "top_k"):
        value = settings.get(name)
        if value is None:
            continue
        try:
            if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else int | float):
                raise ValueError
            found[name] = value if name == "top_k" else float(value)
            Sampling(**found)
        except (InputError, ValueError, OverflowError):
            expected = f"a number as {_flag(name)} takes it"
            raise InputError(f"{path}: {name}: expected {expected}, found {reprlib.repr(value)}") from None
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def sampling_of(options: argparse.Namespace, folder: Path | None = None) -> Sampling:
    """The flags --temperature, --top-p, --top-k and --seed; what they leave open is as the checkpoint suggests.

    Args:
      options: with these flags.
      folder: the checkpoint's, None for the flags alone.

    Raises:
      InputError: for settings that are out of range.
    """
    given = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k")}
    given = {name: value for name, value in given.items() if value is not None}
    suggested = _suggested(folder) if folder is not None else {}
    sampling = Sampling(**(suggested | given), seed=options.seed)
    taken = [f"{_flag(name)} {value}" for name, value in suggested.items() if name not in given]
    if taken and sampling.temperature >= GREEDY_BELOW:
        note(f"dsjax: sampling as generation_config.json suggests: {' '.join(taken)}")
    return sampling


def parallel_of(options: argparse.Namespace, config: Config, numerics: Numerics) -> Parallel | None:
    """The flags --mesh, --attention, --spmd, --dispatch and --o-groups; None for one device.

    Raises:
      InputError: if the plan cannot work for this model, or on the devices that are there.
    """
    if options.mesh is None:
        if jax.process_count() > 1:
            raise InputError(f"{jax.process_count()} processes: expected --mesh, found none")
        for flag, default in (("attention", "heads"), ("spmd", "manual"), ("dispatch", "auto"), ("o_groups", "split")):
            if getattr(options, flag) != default:
                raise InputError(f"{_flag(flag)} {getattr(options, flag)}: expected with --mesh, found no --mesh")
        return None
    return parallel(
        config,
        options.mesh,
        numerics,
        attention=options.attention,
        spmd=options.spmd,
        dispatch=options.dispatch,
        o_groups=options.o_groups,
    )


def arrange(
    options: argparse.Namespace, config: Config, numerics: Numerics, batch: int, length: int
) -> Parallel | None:
    """Where --mesh puts the checkpoint of --model, None for one device, after a look at whether it can fit there.

    Args:
      config, numerics: of the checkpoint, from `checkpoint_config` and `Numerics.for_checkpoint`.
      batch, length: slots and positions of the cache that it will get.

    Raises:
      InputError: if it cannot work, or cannot fit.
    """
    many = parallel_of(options, config, numerics)
    devices = list(many.mesh.devices.flat) if many else jax.devices()[:1]
    found = many.layout if many else layout(config, Plan())
    model = planned_model(str(options.model), numerics, options.weights)
    check_memory(model, Load(length, batch), found, devices)
    return many


def load_model(
    options: argparse.Namespace, config: Config, numerics: Numerics, batch: int, length: int, *, mtp: bool = False
) -> tuple[Config, Tree, Parallel | None]:
    """The checkpoint of --model, held as --weights says, where --mesh says.

    Args:
      config, numerics, batch, length: of `arrange`.
      mtp: with its draft module.

    Raises:
      InputError: before anything is loaded if it cannot work, or cannot fit; see `load`.
    """
    many = arrange(options, config, numerics, batch, length)
    config, params, stats = load_onto(many, options.model, mtp=mtp, weights=options.weights, progress=show_progress())
    if options.weights == "float16":
        lost = stats.narrowed
        note(f"float16: {lost.subnormal} values below 2^-14 keep fewer bits, {lost.flushed} became zero")
    return config, params, many


def checkpoint_config(folder: Path) -> Config:
    """The config of a folder; a preset's name, which has no weights, is refused."""
    if not os.path.isdir(folder):
        raise InputError(f"--model {folder}: expected a checkpoint folder, found none")
    return load_config(folder)


def stop_ids(folder: Path, config: Config, text: Text | None) -> tuple[int, ...]:
    """Ids that end a sequence: the config's, generation_config.json's and the tokenizer's."""
    stop = set(config.eos_token_ids)
    path, settings = _generation_config(folder)
    stop |= set(token_ids(settings, "eos_token_id", config.vocab_size, str(path)))
    if text is not None and text.eos is not None:
        stop.add(text.eos)
    return tuple(sorted(stop))
