"""The one exception for a user's mistake or a damaged file."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input or environment, told in one line.

    The message names the file and tensor (or flag) at fault, what was expected and what was found. The command
    line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
