"""The results that are compared: a file of arrays, or a folder of goldens' results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsjax.errors import InputError
from dsjax.export.standalone.arrays import BadInput, Stored, find_arrays, read_arrays


@contextmanager
def bad_input(path: Path) -> Iterator[None]:
    """What the standalone readers say of a bad file, as our commands say it."""
    try:
        yield
    except BadInput as e:
        raise InputError(str(e)) from None
    except OSError as e:
        raise InputError(f"{path}: expected a usable file or folder, found: {e.strerror or e}") from None


def read_results(path: Path) -> dict[str, Stored]:
    """Results by name, memory-mapped where the format allows it.

    Args:
      path: .safetensors (also one of taps), .npz, or .npy of logits; or a folder with `outputs.safetensors` or
        `outputs.npz` of its own, or in a folder per golden (their results are named GOLDEN/RESULT); or a bundle, whose
        goldens these are.

    Raises:
      InputError: if it holds no results, or something in it is damaged.
    """
    with bad_input(path):
        if not path.is_dir():
            return read_arrays(path)
        own = find_arrays(path)
        if own is not None:
            return own
        parent = path / "golden" if (path / "golden").is_dir() else path
        found: dict[str, Stored] = {}
        for folder in sorted(f for f in parent.iterdir() if f.is_dir()):
            found |= {f"{folder.name}/{name}": array for name, array in (find_arrays(folder) or {}).items()}
    if not found:
        raise InputError(f"{path}: expected outputs.safetensors or outputs.npz in it or in its folders, found none")
    return found
