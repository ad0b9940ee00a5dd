"""Text in and out: the checkpoint's tokenizer, its chat template in a sandbox, and streaming decode."""

from __future__ import annotations

import dataclasses
import json
import reprlib
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


def _to_json(value: Any, **options: Any) -> str:
    """The templates' tojson: jinja's own would escape <, > and & for HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


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
        """One above the highest token's id; ids from here on are padding and must not be sampled."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

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
        ids = self._ids(text, special=True)
        if self.settings.get("add_bos_token") and self.bos is not None and ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        return ids

    def encode_chat(self, messages: Sequence[Message], *, thinking: bool = False) -> list[int]:
        """Ids of a conversation with the generation prompt; the template writes begin-of-sentence itself."""
        return self.encode_rendered(self.render(messages, thinking=thinking))

    def encode_rendered(self, rendered: str) -> list[int]:
        """Ids of what `render` gave."""
        return self._ids(rendered, special=False)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens=special).ids
        except Exception as e:  # not Unicode (a lone surrogate), or a tokenizer without a rule for some of it
            raise InputError(f"{self.folder}: expected text that the tokenizer can encode, found: {e}") from None

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

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, autoescape=False, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        environment.filters["tojson"] = _to_json
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
    model = read_json_object(path).get("model")
    if isinstance(model, dict) and model.get("continuing_subword_prefix"):  # aborts the process in tokenizers 0.22
        raise InputError(f"{path}: model: expected a byte-level tokenizer, found one with a continuing_subword_prefix")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise InputError(f"{path}: expected a tokenizer, found something unreadable: {e}") from None
    tokenizer.no_truncation()  # saved with the file, but meant for training
    tokenizer.no_padding()
    config_path = folder / "tokenizer_config.json"
    settings = read_json_object(config_path) if config_path.is_file() else {}
    template = settings.get("chat_template")
    file = folder / "chat_template.jinja"
    source = config_path
    if file.is_file():
        source = file
        template = file.read_text(encoding="utf-8", errors="replace")
    if isinstance(template, list):  # several named templates
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
        )
    if template is not None and (not isinstance(template, str) or len(template) > _MAX_TEMPLATE_CHARS):
        raise InputError(f"{source}: chat template: expected text, found {reprlib.repr(template)}")
    return Text(tokenizer, settings, template, folder)


class Stream:
    """Turns one sequence's ids into text as they come, holding back a character until all its bytes are there.

    DeepSeek's tokenizers are byte-level, so text can be decoded in pieces that end on whole characters.
    """

    def __init__(self, text: Text, emit: Callable[[str], object]) -> None:
        self._text = text
        self._emit = emit
        self._held: list[int] = []
        self._shown = 0  # characters of `_held` that are out already

    def push(self, token: int) -> None:
        """Takes the next id."""
        self._held.append(token)
        text = self._text.decode(self._held)
        # However many bytes are not valid, only the last replacement character can still become part of another.
        whole = not text.endswith("\ufffd")
        self._show(text if whole else text[:-1])
        if whole:
            self._held, self._shown = [], 0

    def finish(self) -> None:
        """Emits what was held back."""
        self._show(self._text.decode(self._held))
        self._held, self._shown = [], 0

    def _show(self, text: str) -> None:
        if len(text) > self._shown:
            self._emit(text[self._shown :])
            self._shown = len(text)


def split_thinking(prompt: str, output: str) -> tuple[str, str]:
    """(reasoning, answer) of a chat output; a prompt that ends inside a think block counts as its opening."""
    text = THINK + output if prompt.rstrip().endswith(THINK) else output
    before, found, after = text.partition(END_THINK)
    if found:
        return before.removeprefix(THINK).strip(), after.strip()
    if text.startswith(THINK):
        return text.removeprefix(THINK).strip(), ""
    return "", text.strip()
