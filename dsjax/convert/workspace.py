"""The folder beside a result in which it grows: what is finished stays, whatever happens, and nothing else does.

    .NAME.partial/state/    plan.json; a record of each finished shard and each hashed file; files that grow
    .NAME.partial/result/   finished files; becomes NAME

A file is finished when it has been written whole, flushed to the disk and renamed; a shard, when its record is, too.
Processes share the folder: each holds a shared lock on `state` while it runs, so that nobody throws the folder away
under it; one that writes a file holds a lock on that, and the folder itself is set up and given its name under a lock
on the folder around it. A lock goes with its process, so none is left behind.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dsjax.checkpoint.safetensors import os_errors
from dsjax.config import read_json_object
from dsjax.errors import InputError

_PLAN, _COMPLETE = "plan.json", "complete.json"


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether what was opened under a name still has it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


class Growing:
    """A file under a temporary name, locked. Either `commit` or `discard` ends it; a second end does nothing.

    Attributes:
      descriptor: to write to.
      path: its name to be, for messages.
    """

    def __init__(self, path: Path, temporary: Path) -> None:
        self.path, self._temporary = path, temporary
        while True:
            with os_errors(path):
                self.descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self.descriptor)
                raise InputError(f"{temporary}: expected no other process to write it, found one") from None
            if _is_still(self.descriptor, temporary):
                break
            os.close(self.descriptor)  # another process has finished or removed it since it was opened here
        self._open = True

    def commit(self) -> None:
        """Waits until it is on the disk, and gives it its name.

        Raises:
          InputError: if the disk cannot take it; then it is gone.
        """
        try:
            with os_errors(self.path):
                os.fsync(self.descriptor)
                self.path.parent.mkdir(exist_ok=True)
                os.replace(self._temporary, self.path)
                _flush_folder(self.path.parent)
            self._close()
        finally:
            self.discard()

    def discard(self) -> None:
        """Removes it."""
        if self._open:
            with suppress(OSError):
                self._temporary.unlink()
            self._close()

    def _close(self) -> None:
        self._open = False
        os.close(self.descriptor)


class Workspace:
    """Of one result."""

    def __init__(self, out: Path) -> None:
        self.out = out.absolute()
        self.folder = self.out.parent / f".{self.out.name}.partial"
        self.state = self.folder / "state"
        self.result = self.folder / "result"
        self._old = self.folder / "old"  # a finished result while another takes its place
        self._working: int | None = None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other processes from doing the same."""
        descriptor = os.open(self.out.parent, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def begin(self, identity: dict[str, Any], check: Callable[[], None], *, force: bool) -> bool:
        """Sets the folder up, or finds it as another run left it; `end` must follow.

        Args:
          identity: of source and options; JSON.
          check: raises InputError if the result's place is taken.
          force: an unfinished conversion of something else may be thrown away.

        Returns:
          Whether the result is complete and has only to be put in its place.

        Raises:
          InputError: if another conversion is unfinished there, at work if it was to be thrown away, or the folder
            cannot be made.
        """
        with os_errors(self.folder):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self._alone():
                if self.folder.exists() and (found := self._identity()) != identity:
                    if self._old.exists() and not os.path.lexists(self.out):
                        os.replace(self._old, self.out)  # the other run was stopped after it had moved it away
                    if found is not None and not force:
                        differ = [k for k in identity if found.get(k) != identity[k]]
                        raise InputError(
                            f"{self.folder}: expected an unfinished conversion of the same source with the same "
                            f"options, found one with another {', '.join(differ)} (--force throws it away)"
                        )
                    check()
                    self._throw_away()
                elif not self._placed:
                    check()
                elif not self.out.exists():
                    self._throw_away()
                if not self.folder.exists():
                    self.state.mkdir(parents=True)
                    self.result.mkdir()
                    self.put_json(self.state / _PLAN, identity)
                    _flush_folder(self.out.parent)
                self._working = os.open(self.state, os.O_RDONLY)
                fcntl.flock(self._working, fcntl.LOCK_SH)  # no waiting: others take it whole only when alone
                return (self.state / _COMPLETE).exists()

    def end(self) -> None:
        """Lets others throw the folder away."""
        if self._working is not None:
            os.close(self._working)
            self._working = None

    def _throw_away(self) -> None:
        """Removes the folder, unless a run is at work there."""
        if self.state.exists():
            descriptor = os.open(self.state, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.folder}: expected no process at work there, found one") from None
            finally:
                os.close(descriptor)  # nobody begins while this process is alone
        (self.state / _PLAN).unlink(missing_ok=True)  # first: what is left, if this is stopped, is nobody's
        shutil.rmtree(self.folder)

    @property
    def _placed(self) -> bool:
        """Whether a result has got its name (and perhaps lost it again), and a run was stopped before it tidied up."""
        return (self.state / _COMPLETE).exists() and not self.result.exists()

    def _identity(self) -> dict[str, Any] | None:
        """What an existing folder is about; None if it was not even set up."""
        try:
            return read_json_object(self.state / _PLAN)
        except InputError:
            return None

    # --- files ---

    def grow(self, path: Path) -> Growing:
        """Begins a file that is going to appear under this name.

        Raises:
          InputError: if another process writes the same file, or it cannot be made.
        """
        return Growing(path, self._temporary(path))

    def _temporary(self, path: Path) -> Path:
        return self.state / (path.parent.name + "-" + path.name + ".tmp")  # one name, two folders

    def left_over(self, path: Path) -> int:
        """Bytes on the disk that a stopped run left of a file, and whoever grows it again gets back."""
        try:
            return os.stat(self._temporary(path)).st_blocks * 512
        except FileNotFoundError:
            return 0

    def put_file(self, path: Path, fill: Callable[[int, Path], Any]) -> None:
        """Lets `fill` write a file (descriptor, name for messages), and makes it appear whole.

        Raises:
          InputError: see `grow`; or it cannot be written, and is gone then.
        """
        growing = self.grow(path)
        try:
            with os_errors(path):
                fill(growing.descriptor, path)
            growing.commit()
        finally:
            growing.discard()

    def put_bytes(self, path: Path, data: bytes) -> None:
        """Writes a small file, whole."""

        def fill(descriptor: int, _: Path) -> None:
            os.ftruncate(descriptor, 0)
            rest = memoryview(data)
            while len(rest):
                rest = rest[os.write(descriptor, rest) :]

        self.put_file(path, fill)

    def put_json(self, path: Path, content: Any, indent: int | None = None) -> None:
        """Writes JSON, whole."""
        self.put_bytes(path, (json.dumps(content, indent=indent) + "\n").encode())

    def put_copy(self, source: Path, path: Path) -> None:
        """Copies a small file, whole."""
        self.put_bytes(path, source.read_bytes())

    def record(self, name: str) -> dict[str, Any] | None:
        """A record that a run has left; None if it has not."""
        path = self.state / name
        return read_json_object(path) if path.exists() else None

    def put_record(self, name: str, content: dict[str, Any]) -> None:
        self.put_json(self.state / name, content)

    # --- the end ---

    def finish(self, complete: Callable[[], None], *, force: bool) -> None:
        """Completes the result and gives it its name; of several processes the first does it, the others find it done.

        Args:
          complete: writes what is missing of the result.
          force: a finished result may be replaced.

        Raises:
          InputError: if the name has been taken meanwhile.
        """
        with os_errors(self.out), self._alone():
            if self._working is None or not _is_still(self._working, self.state):
                return
            if self.result.exists():
                if not (self.state / _COMPLETE).exists():
                    complete()
                    self.put_record(_COMPLETE, {})
                if self.out.exists() and any(self.out.iterdir()):
                    if not force:
                        raise InputError(f"{self.out}: expected no such folder, or an empty one, found something there")
                    os.replace(self.out, self._old)
                os.replace(self.result, self.out)
                _flush_folder(self.out.parent)
            shutil.rmtree(self.folder)
