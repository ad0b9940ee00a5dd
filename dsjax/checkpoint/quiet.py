"""Calls of a library that reports its errors more than once: one exception, one line, nothing on standard error."""

from __future__ import annotations

import dataclasses
import gc
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax

T = TypeVar("T")


class Failed(Exception):
    """A call failed; the message is the root cause in one short line."""


@dataclasses.dataclass(frozen=True)
class _Filter:
    """An unraisable-exception hook that drops answers to readers that have given up."""

    hook: Callable[[Any], Any]

    def __call__(self, unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            self.hook(unraisable)


def _was_retrieved(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps off standard error what Orbax logs beside the error that it raises.

    Where the reads of several shards fail, the later ones answer to an event loop that is closed by then, which Python
    reports by `sys.unraisablehook` or asyncio's logger. That may be a moment after the error, so then filters stay.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    disabled, logger.disabled = logger.disabled, True
    sys.unraisablehook = hook if isinstance(hook, _Filter) else _Filter(hook)
    logging.getLogger("asyncio").addFilter(_was_retrieved)
    try:
        yield
        sys.unraisablehook = hook
        logging.getLogger("asyncio").removeFilter(_was_retrieved)
    finally:
        logger.disabled = disabled


def _why(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


def call(action: Callable[[], T]) -> T:
    """What `action` returns.

    Raises:
      Failed: for whatever it raises but a lack of memory and interrupts.
    """
    with _quiet():
        try:
            return action()
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as e:
            why = _why(e)
        with warnings.catch_warnings():  # of coroutines that nobody awaits any more; collected here, not at some time
            warnings.simplefilter("ignore")
            gc.collect(1)  # the young, quickly
        raise Failed(why)
