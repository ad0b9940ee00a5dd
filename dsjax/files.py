"""Writing results whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsjax.errors import InputError


def check_new_folder(out: Path) -> None:
    """Refuses a folder that `new_folder` would not write, before the work that makes its content.

    Raises:
      InputError: if `out` exists and is not an empty folder.
    """
    try:
        if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
            raise InputError(f"{out}: expected no such file or an empty folder, found something there")
    except OSError as e:
        raise InputError(f"{out}: cannot be written: {e.strerror}") from None


def check_space(out: Path, needed: int) -> None:
    """Refuses what is larger than the space left on the disk that `out` will be on.

    Raises:
      InputError: naming both numbers.
    """
    existing = next((p for p in out.absolute().parents if p.is_dir()), Path("/"))
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(f"{out}: expected {needed:,} bytes free on the disk, found {free:,}")


def _remove(folder: Path) -> None:
    """Removes a folder that others may still write to for a moment, as Orbax's threads do after one has failed."""
    for _ in range(40):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    Raises:
      InputError: if `out` exists and is not an empty folder, or cannot be made.
    """
    check_new_folder(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as e:
        raise InputError(f"{out}: cannot be written: {e.strerror}") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, out)
    except OSError as e:
        raise InputError(f"{out}: cannot be written: {e.strerror}") from None
    finally:
        _remove(temporary)


def check_new_file(out: Path) -> None:
    """Refuses a file that `new_file` could not write, before the work that makes its content.

    Raises:
      InputError: if `out` is a folder, or its folder does not exist or cannot be written to.
    """
    if os.path.isdir(out):
        raise InputError(f"{out}: expected the name of a file to write, found a folder")
    if not os.path.isdir(out.parent):
        raise InputError(f"{out}: expected an existing folder to write to, found none")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"{out}: expected a folder that can be written to, found one that cannot")


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A temporary file beside `out` that replaces `out` when the block ends well, and vanishes when it does not."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{out.name}.", suffix=out.suffix, dir=out.parent)
    except OSError as e:
        raise InputError(f"{out}: cannot be written: {e.strerror}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, out)
    except OSError as e:
        raise InputError(f"{out}: cannot be written: {e.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
