"""`dsjax chat`: a conversation line by line, from a terminal or a pipe, with history and streaming.

A line is a user's message. `/tool RESULT` is the result of a function that the model called, `/clear` begins anew,
`/exit` or the end of the input ends. Other words behind a slash are refused; a space before it makes them a message.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from dsjax.chat import Reply
from dsjax.cli.common import checkpoint_config, load_model, note, numerics_of, sampling_of, stop_ids
from dsjax.cli.conversation import Conversations, LiveReply
from dsjax.cli.ops import note_operators
from dsjax.errors import InputError
from dsjax.generate import Engine, Memory, check_ids
from dsjax.sampling import Sampling
from dsjax.text import load_text

_COMMANDS = "/tool RESULT, /clear or /exit"
_MAX_LENGTH = 32768  # positions by default; a model's longest context would take its memory from the start
Messages = list[dict[str, Any]]


@dataclasses.dataclass
class _Session:
    """A conversation under way.

    Attributes:
      conversations: how it is encoded.
      history: its messages, of which all but the first `opening` are cleared by /clear.
      engine, sampling, stop: as for `generate`.
      max_length: positions, the same in every turn, so that compiled steps are used again.
      max_new_tokens: of a reply; None for the room that is left.
      memory: the last turn's cache.
    """

    conversations: Conversations
    engine: Engine
    sampling: Sampling
    stop: tuple[int, ...]
    max_length: int
    max_new_tokens: int | None
    history: Messages = dataclasses.field(default_factory=list)
    memory: Memory = dataclasses.field(default_factory=Memory)

    def clear(self) -> None:
        """Begins anew."""
        self.history, self.memory = self.conversations.opening(), Memory()

    def unanswered(self) -> list[str]:
        """Ids of the calls of the last reply that no result has answered yet."""
        calls: list[str] = []
        for message in self.history:
            if message["role"] == "tool":
                calls.remove(message["tool_call_id"])
            else:
                calls = [call["id"] for call in message.get("tool_calls", ())]
        return calls

    def take(self, line: str) -> None:
        """One line: the message it holds, and the reply to it.

        Raises:
          InputError: if it cannot be encoded, or no longer fits; the history is as it was before.
        """
        command, _, result = line.partition(" ")
        if command.startswith("/") and (command != "/tool" or not result.strip()):
            raise InputError(f"expected {_COMMANDS}, or a space before the slash, found {line[:40]!r}")
        calls = self.unanswered()
        message: dict[str, Any] = {"role": "user", "content": line}
        if command == "/tool":
            if not calls:
                raise InputError("/tool: expected it after a reply that calls a function, found no call")
            message = {"role": "tool", "tool_call_id": calls.pop(0), "content": result}
            if calls:
                self.history.append(message)
                note(f"dsjax: /tool: {len(calls)} more to answer")
                return
        messages = [*self.history, message]
        reply = self.reply(self.conversations.encode(messages))
        self.history = [*messages, reply.to_openai()]

    def reply(self, prompt: str) -> Reply:
        """Generates and shows the reply to a prompt; Ctrl-C ends it early.

        What the prompt shares with the last turn's is not prefilled again.

        Raises:
          InputError: if the prompt leaves no room for a reply.
        """
        ids = self.conversations.ids(prompt)
        if len(ids) >= self.max_length:
            limit = f"{self.max_length} positions (--max-length)"
            raise InputError(f"the conversation has {len(ids)} tokens now and {limit}; /clear begins anew")
        live = LiveReply(
            self.conversations.text, self.conversations.encoding.parser(prompt), partial(print, end="", flush=True)
        )
        ended = "interrupted"
        try:
            (output,), _ = self.engine.generate(
                [ids],
                self.max_new_tokens or self.max_length - len(ids),
                self.sampling,
                max_length=self.max_length,
                stop=self.stop,
                memory=self.memory,
                on_token=lambda _, token: live.push(token),
            )
            ended = {"stop": "", "length": "cut off by --max-new-tokens or --max-length"}[output.finish_reason]
        except KeyboardInterrupt:
            pass
        reply = live.finish()
        print(flush=True)
        if ended:
            note(f"dsjax: the reply was {ended}" + (", and has no answer yet" if live.thinking else ""))
        if reply.problem:
            note(f"dsjax: tool calls left in the content: {reply.problem}")
        return reply


def _lines() -> Iterator[str]:
    """Lines of standard input; a prompt is shown on a terminal only, where Ctrl-C gives a new line."""
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is no text is refused where it is encoded
        sys.stdin.reconfigure(errors="surrogateescape")
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives `input` the editing of lines)
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def chat(options: argparse.Namespace) -> int:
    """`dsjax chat`."""
    if sys.stdin is None:
        raise InputError("standard input: expected lines to reply to, found it closed")
    sampling_of(options)  # wrong flags first
    numerics = numerics_of(options)
    config = checkpoint_config(options.model)
    sampling = sampling_of(options, options.model)
    numerics = numerics.for_checkpoint(config, options.weights)
    text = load_text(options.model)
    conversations = Conversations(options, text, config)
    # What is wrong with format, tools or flags is said before the weights are loaded.
    example = conversations.encode([*conversations.opening(), {"role": "user", "content": "?"}])
    check_ids(conversations.ids(example), config, "a conversation")
    stop = stop_ids(options.model, config, text)
    max_length = min(options.max_length or _MAX_LENGTH, config.max_position_embeddings)
    config, params, many = load_model(options, config, numerics, 1, max_length)
    engine = Engine(config, params, numerics, conversations.text.size, many)
    note_operators(engine.platform)
    session = _Session(conversations, engine, sampling, stop, max_length, options.max_new_tokens)
    session.clear()
    for line in _lines():
        if line.strip() == "/exit":
            break
        if line.strip() == "/clear":
            session.clear()
        elif line.strip():
            try:
                session.take(line)
            except InputError as e:
                note(f"dsjax: {e}")
    return 0
