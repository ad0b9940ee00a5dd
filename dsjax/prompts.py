"""Prompts and token arrays from the command line and from files."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.errors import InputError
from dsjax.text import Text


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt's ids, and its text as the chat template rendered it if it is a conversation."""

    ids: list[int]
    rendered: str | None = None


def _need(text: Text | None, where: str) -> Text:
    if text is None:
        raise InputError(f"{where}: expected a tokenizer.json to read text with, found none; give ids instead")
    return text


def _chat(messages: list[dict[str, Any]], text: Text, thinking: bool) -> Prompt:
    rendered = text.render(messages, thinking=thinking)
    return Prompt(text.tokenizer.encode(rendered, add_special_tokens=False).ids, rendered)


def _line(line: str, where: str, text: Text | None, thinking: bool) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: expected a JSON object, found {line[:60]!r}") from None
    given = [k for k in ("prompt", "ids", "messages") if isinstance(entry, dict) and k in entry]
    if len(given) != 1:
        raise InputError(f'{where}: expected one of "prompt", "ids" or "messages", found {line[:60]!r}')
    value = entry[given[0]]
    if given == ["prompt"] and isinstance(value, str):
        return Prompt(_need(text, where).encode(value))
    if given == ["ids"] and isinstance(value, list) and all(type(i) is int for i in value):
        return Prompt(value)
    if given == ["messages"] and isinstance(value, list) and all(isinstance(m, dict) for m in value):
        return _chat(value, _need(text, where), thinking)
    raise InputError(f"{where}: {given[0]}: expected a text, list of integers or list of objects, found {line[:60]!r}")


def read_prompts(options: argparse.Namespace, text: Text | None) -> list[Prompt]:
    """The prompts that `generate`'s options ask for.

    Raises:
      InputError: naming the flag, or file and line.
    """
    if options.prompt_ids is not None:
        return [Prompt(options.prompt_ids)]
    if options.prompt is not None:
        where = "--prompt"
        if not options.prompt:
            raise InputError("--prompt: expected some text, found none")
        if options.chat:
            message = {"role": "user", "content": options.prompt}
            return [_chat([message], _need(text, where), options.thinking)]
        return [Prompt(_need(text, where).encode(options.prompt))]
    path: Path = options.prompts
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: expected a JSONL file, found none readable: {e}") from None
    prompts = [
        _line(line, f"{path} line {number}", text, options.thinking)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise InputError(f"{path}: expected at least one prompt, found none")
    return prompts


def read_tokens(path: Path) -> np.ndarray:
    """Token ids [B, T] from .npy (never unpickled) or .json.

    Raises:
      InputError: if the file is unreadable, not integer, or not two-dimensional and non-empty.
    """
    try:
        if path.suffix == ".json":
            tokens = np.asarray(json.loads(path.read_text(encoding="utf-8")))
        else:
            tokens = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, RecursionError) as e:
        raise InputError(f"{path}: expected int [B, T] as .npy or .json, found something unreadable: {e}") from None
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"{path}: expected int [B, T], found {tokens.dtype} {list(tokens.shape)}")
    return tokens
