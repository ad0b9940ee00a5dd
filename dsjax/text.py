"""Text in and out: the checkpoint's tokenizer, its chat template in a sandbox, and streaming decode."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from dsjax.config import read_json_object
from dsjax.errors import InputError

Message = dict[str, Any]
_MAX_TEMPLATE_CHARS = 1 << 20
THINK, END_THINK = "<think>", "</think>"


def _content(token: Any) -> str | None:
    """A special token of tokenizer_config.json, which is a string or an object with "content"."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


@dataclasses.dataclass(frozen=True)
class Text:
    """A checkpoint's tokenizer and chat template.

    Attributes:
      tokenizer: from tokenizer.json.
      settings: tokenizer_config.json, empty if there is none.
      template: source of the chat template, if the checkpoint has one.
      folder: for messages.
    """

    tokenizer: Tokenizer
    settings: dict[str, Any]
    template: str | None
    folder: Path

    @property
    def size(self) -> int:
        """Number of tokens; ids from here on are padding and must not be sampled."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def bos(self) -> int | None:
        token = _content(self.settings.get("bos_token"))
        return None if token is None else self.tokenizer.token_to_id(token)

    @property
    def eos(self) -> int | None:
        token = _content(self.settings.get("eos_token"))
        return None if token is None else self.tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with the begin-of-sentence token in front where the checkpoint asks for it, never twice."""
        ids = self.tokenizer.encode(text, add_special_tokens=True).ids
        if self.settings.get("add_bos_token") and self.bos is not None and ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        return ids

    def encode_chat(self, messages: Sequence[Message], *, thinking: bool = False) -> list[int]:
        """Ids of a conversation with the generation prompt; the template writes begin-of-sentence itself."""
        return self.tokenizer.encode(self.render(messages, thinking=thinking), add_special_tokens=False).ids

    def render(self, messages: Sequence[Message], *, thinking: bool = False) -> str:
        """The conversation as text, by the checkpoint's own template.

        The template runs sandboxed: it sees the messages and nothing of Python's insides.

        Raises:
          InputError: if there is no template, or it fails or tries to leave the sandbox.
        """
        if self.template is None:
            raise InputError(f"{self.folder}: expected a chat template in tokenizer_config.json, found none")

        def refuse(message: str) -> str:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
        environment.globals["raise_exception"] = refuse
        environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
        try:
            return environment.from_string(self.template).render(
                messages=list(messages),
                add_generation_prompt=True,
                thinking=thinking,
                bos_token=_content(self.settings.get("bos_token")) or "",
                eos_token=_content(self.settings.get("eos_token")) or "",
            )
        except Exception as e:  # a template may fail in any way that an expression can
            raise InputError(f"{self.folder}: chat template: {type(e).__name__}: {e}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out, and ids that no token has give nothing."""
        return self.tokenizer.decode([i for i in ids if i < self.size], skip_special_tokens=True)


def load_text(folder: Path) -> Text | None:
    """The folder's tokenizer, or None if it has none.

    Raises:
      InputError: for a damaged tokenizer.json, tokenizer_config.json or template.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise InputError(f"{path}: expected a tokenizer, found something unreadable: {e}") from None
    config_path = folder / "tokenizer_config.json"
    settings = read_json_object(config_path) if config_path.is_file() else {}
    template = settings.get("chat_template")
    file = folder / "chat_template.jinja"
    if file.is_file():
        template = file.read_text(encoding="utf-8", errors="replace")
    if isinstance(template, list):  # several named templates
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and (not isinstance(template, str) or len(template) > _MAX_TEMPLATE_CHARS):
        raise InputError(f"{config_path}: chat_template: expected text, found {json.dumps(template)[:60]}")
    return Text(tokenizer, settings, template, folder)


class Stream:
    """Turns one sequence's ids into text as they come, holding back a character until all its bytes are there.

    DeepSeek's tokenizers are byte-level, so text can be decoded in pieces that end on whole characters.
    """

    _PATIENCE = 8  # tokens after which bytes that never become a character are shown as they are

    def __init__(self, text: Text, emit: Callable[[str], object]) -> None:
        self._text = text
        self._emit = emit
        self._held: list[int] = []

    def push(self, token: int) -> None:
        """Takes the next id."""
        self._held.append(token)
        if len(self._held) >= self._PATIENCE or not self._text.decode(self._held).endswith("\ufffd"):
            self.finish()

    def finish(self) -> None:
        """Emits what was held back."""
        if self._held:
            self._emit(self._text.decode(self._held))
            self._held = []


def split_thinking(prompt: str, output: str) -> tuple[str, str]:
    """(reasoning, answer) of a chat output; a prompt that ends inside a think block counts as its opening."""
    text = THINK + output if prompt.rstrip().endswith(THINK) else output
    before, found, after = text.partition(END_THINK)
    if found:
        return before.removeprefix(THINK).strip(), after.strip()
    if text.startswith(THINK):
        return text.removeprefix(THINK).strip(), ""
    return "", text.strip()
