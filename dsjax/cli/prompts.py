"""Prompts and token arrays from the command line and from files."""

from __future__ import annotations

import argparse
import dataclasses
import json
import reprlib
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.config import Config
from dsjax.errors import InputError
from dsjax.generate import check_ids
from dsjax.text import Text


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt's ids, and its text as the chat template rendered it if it is a conversation."""

    ids: list[int]
    rendered: str | None = None


def _need(text: Text | None) -> Text:
    if text is None:
        raise InputError("expected a tokenizer.json to read text with, found none; give ids instead")
    return text


def _prompt(entry: Any, text: Text | None, thinking: bool) -> Prompt:
    """The prompt that one JSON object describes."""
    given = [k for k in ("prompt", "ids", "messages") if isinstance(entry, dict) and k in entry]
    if len(given) != 1:
        raise InputError(f'expected one of "prompt", "ids" or "messages", found {reprlib.repr(entry)}')
    value = entry[given[0]]
    if given == ["prompt"] and isinstance(value, str) and value:
        return Prompt(_need(text).encode(value))
    if given == ["ids"] and isinstance(value, list) and all(type(i) is int for i in value):
        return Prompt(value)
    if given == ["messages"] and isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
        rendered = _need(text).render(value, thinking=thinking)
        return Prompt(_need(text).encode_rendered(rendered), rendered)
    expected = {"prompt": "some text", "ids": "a list of integers", "messages": "objects in a list"}[given[0]]
    raise InputError(f"{given[0]}: expected {expected}, found {reprlib.repr(value)}")


def _entry(entry: Any, text: Text | None, config: Config, options: argparse.Namespace, where: str) -> Prompt:
    """The prompt, if the model can take it: said before the weights are loaded."""
    try:
        prompt = _prompt(entry, text, options.thinking)
    except InputError as e:
        raise InputError(f"{where}: {e}") from None
    check_ids(prompt.ids, config, where)
    limit, reason = config.max_position_embeddings, "max_position_embeddings"
    if options.max_length is not None and options.max_length < limit:
        limit, reason = options.max_length, "--max-length"
    if len(prompt.ids) > limit:
        raise InputError(f"{where}: expected at most {limit} tokens ({reason}), found {len(prompt.ids)}")
    return prompt


def read_prompts(options: argparse.Namespace, text: Text | None, config: Config) -> list[Prompt]:
    """The prompts that `generate`'s options ask for.

    Raises:
      InputError: naming the flag, or file and line; also for prompts that the model cannot take.
    """
    if options.chat and options.prompt is None:
        raise InputError('--chat: expected it with --prompt; in a file, give lines with "messages"')
    if options.thinking and not (options.chat or options.prompts):
        raise InputError("--thinking: expected it with --chat, or --prompts with messages")
    if options.prompt_ids is not None:
        return [_entry({"ids": options.prompt_ids}, text, config, options, "--prompt-ids")]
    if options.prompt is not None:
        message = {"role": "user", "content": options.prompt}
        entry = {"messages": [message]} if options.chat and options.prompt else {"prompt": options.prompt}
        return [_entry(entry, text, config, options, "--prompt")]
    path: Path = options.prompts
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also cut at U+2028 inside a string
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: expected a JSONL file, found none readable: {e}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(f"{where}: expected a JSON object, found {line[:60]!r}") from None
            prompts.append(_entry(entry, text, config, options, where))
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
            with path.open("rb") as file:
                tokens = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as e:  # NumPy evaluates the header as a Python literal, which fails in many ways
        raise InputError(f"{path}: expected int [B, T] as .npy or .json, found something unreadable: {e}") from None
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"{path}: expected int [B, T], found {tokens.dtype} {list(tokens.shape)}")
    return tokens
