"""What is said of a result: entries by tensor, a summary, hashes. docs/conversion.md has the schema."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsjax.config import read_json_object
from dsjax.convert.errors import Errors
from dsjax.convert.plan import Job, Options, Part
from dsjax.convert.targets import TARGETS
from dsjax.errors import InputError

CERTIFICATE = "certificate.json"
VERSION = 2

_FINER = "scales of 32 channels, as stored (leave FP4: --to mxfp4), or --to bf16"


def entry(job: Job, part: Part, errors: Errors) -> dict[str, Any]:
    """Of one matrix, or other tensor, of the source."""
    found: dict[str, Any] = {
        "result": job.codes.name.removesuffix("_packed"),
        "class": part.storage,
        "shape": list(part.shape),
    }
    plain = {"format": part.element, "scales": None, "block": None}
    if job.encoding is None:
        described = part.source.describe((part.shape[0], part.shape[1])) if part.scales is not None else plain
        kept = {"source": described, "target": described, "action": "kept"}
        return {**found, **kept, **Errors().summary(), "reasons": [], "alternatives": [], "scales_from": None}
    shape = (part.shape[0], part.shape[1])
    source, target = part.source, job.encoding
    reasons = errors.reasons(target)
    finer = bool(reasons) and source.element == "e2m1" and target.element == "e4m3"
    origin = None
    if target.scales:
        origin = "source" if errors.carried == errors.blocks else "new" if not errors.carried else "source and new"
    return {
        **found,
        "source": source.describe(shape),
        "target": target.describe(shape),
        "action": "converted",
        **errors.summary(),
        "reasons": reasons,
        "alternatives": [_FINER] if finer else [],
        "scales_from": origin,
    }


def part_bytes(job: Job, part: Part) -> tuple[int, int]:
    """Of a part in the source, and its share of the job's in the result."""
    return part.nbytes, job.nbytes // len(job.parts)


_LARGEST = ("max_abs_error", "max_rel_error", "relative_norm")


def summary(entries: Iterable[tuple[dict[str, Any], tuple[int, int]]]) -> dict[str, Any]:
    """By class; of entries and their bytes."""
    found: dict[str, Any] = {}
    for one, (source, result) in entries:
        mine = found.setdefault(
            one["class"],
            {
                **dict.fromkeys(("tensors", "converted", "exact", "parameters", "source_bytes", "result_bytes"), 0),
                **dict.fromkeys(_LARGEST, 0.0),
                "saturated": 0,
                "flushed": 0,
                "reasons": {},
            },
        )
        count = 1
        for n in one["shape"]:
            count *= n
        for key, value in (
            ("tensors", 1),
            ("converted", int(one["action"] == "converted")),
            ("exact", int(one["exact"])),
            ("parameters", count),
            ("source_bytes", source),
            ("result_bytes", result),
            ("saturated", one["saturated"]),
            ("flushed", one["flushed"]),
        ):
            mine[key] += value
        for key in _LARGEST:
            mine[key] = max(mine[key], one[key])
        for reason in one["reasons"]:
            kind = _kind(reason)
            mine["reasons"][kind] = mine["reasons"].get(kind, 0) + 1
    return found


def _kind(reason: str) -> str:
    """A reason without its numbers."""
    if reason.startswith("scale ratio"):
        return "scale ratio above 2^14"
    return reason.split(":")[0].split(" of ")[0] if "sign" not in reason else reason.split(":")[0]


def options_of(options: Options) -> dict[str, Any]:
    """As the certificate names them."""
    return {"to": options.target.name, "only": options.only, "names": options.names}


def certificate(
    options: Options,
    source: dict[str, dict[str, Any]],
    result: dict[str, dict[str, Any]],
    entries: dict[str, tuple[dict[str, Any], tuple[int, int]]],
) -> dict[str, Any]:
    """The whole.

    Args:
      options: what was asked for.
      source, result: of each file, what `hash_file` says.
      entries: by the weight's name in the source, its entry and bytes.
    """

    def files(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {
            "files": {name: {k: file[k] for k in ("bytes", "sha256")} for name, file in sorted(found.items())},
            "tensors": {k: v for _, file in sorted(found.items()) for k, v in file.get("tensors", {}).items()},
        }

    return {
        "version": VERSION,
        **options_of(options),
        "exact": all(one["exact"] for one, _ in entries.values()),
        "summary": summary(entries.values()),
        "source": files(source),
        "result": files(result),
        "tensors": {name: one for name, (one, _) in entries.items()},
    }


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(value, kind) for value in values.values())


def _is_hashed(section: Any) -> bool:
    """Whether it names files and tensors as `certificate` does."""
    if not isinstance(section, dict) or not _are(dict, section.get("files")) or not _are(str, section.get("tensors")):
        return False
    files = section["files"].values()
    return all(isinstance(f.get("bytes"), int) and isinstance(f.get("sha256"), str) for f in files)


def read_certificate(folder: Path) -> dict[str, Any]:
    """A result's certificate. What it says of tensors, and its summary, may be anything: `verify` compares them.

    Raises:
      InputError: naming the file, if there is none, or one that convert has not written.
    """
    path = folder / CERTIFICATE
    found = read_json_object(path)
    to, only, names = found.get("to"), found.get("only"), found.get("names")
    for name, expected, right in (
        ("version", str(VERSION), found.get("version") == VERSION),
        ("to", f"one of {', '.join(TARGETS)}", isinstance(to, str) and to in TARGETS),
        ("only", "a pattern or null", only is None or isinstance(only, str)),
        ("names", "hf, official or null", names in (None, "hf", "official")),
        ("source", "hashes of files and tensors", _is_hashed(found.get("source"))),
        ("result", "hashes of files and tensors", _is_hashed(found.get("result"))),
        ("tensors", "an object of objects", _are(dict, found.get("tensors"))),
    ):
        if not right:
            raise InputError(f"{path}: field {name!r}: expected {expected}, found {found.get(name)!r:.80}")
    return found
