"""One run in many processes: the flags, the start, and what the processes must have in common."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import dsjax
import quant
import sharding
from dsjax.errors import InputError
from sharding.channel import ChannelError
from sharding.cluster import Place, find_place
from sharding.processes import START_S, Group, guard_stdout, start

_OWN = {"run", "json", "compile_cache", "coordinator", "processes", "process_id", "start_timeout"}
_OUTPUTS = {"logits", "mtp_logits"}


def process_flags(parser: argparse.ArgumentParser, hidden: bool = False) -> None:
    """--coordinator, --processes, --process-id and --start-timeout.

    Args:
      parser: of a verb.
      hidden: for a verb that refuses them in its own words.
    """

    def shown(text: str) -> str:
        return argparse.SUPPRESS if hidden else text

    group = parser.add_argument_group(None if hidden else "many processes (default: found from the scheduler)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help=shown("where process 0 listens"))
    group.add_argument("--processes", type=int, metavar="N", help=shown("how many there are"))
    group.add_argument("--process-id", type=int, metavar="I", help=shown("which one this is, from 0"))
    group.add_argument(
        "--start-timeout", type=float, default=START_S, metavar="S", help=shown("seconds for all to come (default 60)")
    )


def _place(options: argparse.Namespace) -> Place | None:
    try:
        return find_place(options.coordinator, options.processes, options.process_id)
    except ValueError as e:
        raise InputError(str(e)) from None


def refuse_many(options: argparse.Namespace, verb: str) -> None:
    """Raises InputError if flags or the environment ask for several processes."""
    place = _place(options)
    if place is not None:
        raise InputError(f"{verb}: expected one process, found {place.processes} ({place.source})")


def join(options: argparse.Namespace) -> Group | None:
    """Makes this process one of several if flags or the environment ask for that; None if it is alone.

    Raises:
      InputError: for wrong flags, and for processes that do not come or do not fit together.
    """
    place = _place(options)
    if place is None:
        return None
    if not 0 < options.start_timeout < 1e6:
        raise InputError(f"--start-timeout {options.start_timeout:g}: expected seconds above 0")
    try:
        group = start(place, options.start_timeout)
    except ChannelError as e:
        raise InputError(str(e)) from None
    guard_stdout(place.process_id == 0)
    try:
        group.agree(facts_of(options), options.start_timeout)
    except ChannelError as e:
        group.fail(str(e))
    if place.process_id == 0:  # not by `note`, which asks JAX, and thereby starts it
        where = f"{place.processes} processes ({place.source}), process 0 at {place.coordinator}"
        print(f"dsjax: {where}", file=sys.stderr, flush=True)
    return group


def facts_of(options: argparse.Namespace) -> dict[str, str]:
    """What has to be equal: the flags, the contents of input files (not where they lie), and our source."""
    facts = {"dsjax": _source(), "verb": options.verb}
    for name, value in vars(options).items():
        if name not in _OWN | _OUTPUTS | {"verb"}:
            shown = _contents(value) if isinstance(value, Path) else str(value)
            facts["--" + name.replace("_", "-")] = shown
    return facts


def _source() -> str:
    """A fingerprint of what runs, finer than a version."""
    digest = hashlib.sha256()
    for package in (dsjax, quant, sharding):
        folder = Path(str(package.__file__)).parent
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return f"source {digest.hexdigest()[:12]}"


def _contents(path: Path) -> str:
    """A file's fingerprint; of a checkpoint's folder, that of its small files and of the sizes of the large ones."""
    digest = hashlib.sha256()
    try:
        for file in _files(path):
            digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode(errors="surrogateescape"))
            if file.suffix != ".safetensors":
                digest.update(file.read_bytes())
    except OSError as e:
        return e.strerror or "cannot be read"  # the verb says it better, if it is so everywhere
    return f"contents {digest.hexdigest()[:12]}"


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        found = (f for pattern in ("*.json", "*.jinja", "*.safetensors", "encoding/*") for f in path.glob(pattern))
        yield from sorted(f for f in found if f.is_file())
    else:
        yield path
