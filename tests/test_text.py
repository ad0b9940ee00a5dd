"""Text in and out: byte-split characters, begin-of-sentence, the conversation formats of each generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.errors import InputError
from dsjax.synth_tokenizer import ASSISTANT, BOS, END_THINK, EOS, MIN_VOCABULARY, THINK, USER, write_tokenizer
from dsjax.text import Stream, Text, load_text, split_thinking


def make(folder: Path, template: str = "deepseek-v3", vocabulary: int = 320) -> Text:
    folder.mkdir(exist_ok=True)
    write_tokenizer(folder, vocabulary, template)
    text = load_text(folder)
    assert text is not None
    return text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return make(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def byte_ids(text: Text) -> list[int]:
    """The id of each byte's own token, by byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    characters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    ids = [text.tokenizer.token_to_id(characters[b]) for b in range(256)]
    assert all(i is not None for i in ids)
    return [i for i in ids if i is not None]


def edit_settings(text: Text, **changes: Any) -> Text:
    path = text.folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    changed = load_text(text.folder)
    assert changed is not None
    return changed


# --- streaming -------------------------------------------------------------------------------------------------------


def stream(text: Text, ids: list[int]) -> list[str]:
    """What is emitted at each push, then at the end; every piece must be something."""
    pieces: list[str] = []
    out = Stream(text, pieces.append)
    steps = []
    for token in [*ids, None]:
        pieces.clear()
        if token is None:
            out.finish()
        else:
            out.push(token)
        assert "" not in pieces
        steps.append("".join(pieces))
    return steps


def test_stream_holds_back_part_of_a_character(text: Text, byte_ids: list[int]) -> None:
    ids = [byte_ids[b] for b in "a🙂é".encode()]
    assert stream(text, ids) == ["a", "", "", "", "🙂", "", "é", ""]


def test_stream_shows_at_the_end_what_never_became_a_character(text: Text, byte_ids: list[int]) -> None:
    ids = [byte_ids[b] for b in b"a\xf0\x9f"]
    assert stream(text, ids) == ["a", "", "", "\ufffd"]


def test_stream_is_not_stuck_on_invalid_bytes(text: Text, byte_ids: list[int]) -> None:
    ids = [byte_ids[b] for b in b"\x80" * 20 + "é".encode()]
    steps = stream(text, ids)
    assert steps[1:20] == ["\ufffd"] * 19
    assert "".join(steps) == "\ufffd" * 20 + "é"


def test_stream_leaves_out_special_tokens(text: Text, byte_ids: list[int]) -> None:
    assert text.bos is not None and text.eos is not None
    first, second, third, fourth = (byte_ids[b] for b in "🙂".encode())
    ids = [text.bos, first, second, text.eos, third, fourth]
    assert "".join(stream(text, ids)) == text.decode(ids) == "🙂"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_stream_loses_nothing(text: Text, byte_ids: list[int], data: st.DataObject) -> None:
    """Any bytes, whole tokens and special tokens: the pieces joined are the text decoded at once."""
    any_id = st.integers(0, text.size + 3) | st.sampled_from([byte_ids[b] for b in "🙂你".encode() + b"\x80\xff\xc3"])
    ids = data.draw(st.lists(any_id, max_size=30))
    assert "".join(stream(text, ids)) == text.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_encode_decode(text: Text, sample: str) -> None:
    ids = text.encode(sample)
    assert max(ids) < text.size
    if not any(token in sample for token in (BOS, EOS)):
        assert text.decode(ids) == sample


# --- ids -------------------------------------------------------------------------------------------------------------


def test_begin_of_sentence_comes_once(text: Text) -> None:
    assert text.encode("hello")[0] == text.bos
    assert text.encode("hello")[1] != text.bos
    assert text.encode(BOS + "hello") == text.encode("hello")
    chat = text.encode_chat([{"role": "user", "content": "hello"}])
    assert [i == text.bos for i in chat].count(True) == 1 and chat[0] == text.bos
    assert text.encode("") == [text.bos]


def test_begin_of_sentence_only_where_asked(tmp_path: Path) -> None:
    text = make(tmp_path)
    assert edit_settings(text, add_bos_token=False).encode("hello") == text.encode("hello")[1:]


def test_special_tokens_as_objects(tmp_path: Path) -> None:
    """tokenizer_config.json may hold an AddedToken written out."""
    text = edit_settings(make(tmp_path), bos_token={"__type": "AddedToken", "content": BOS}, eos_token={"content": EOS})
    assert (text.bos, text.eos) == (0, 1)


def test_no_room_for_a_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, MIN_VOCABULARY - 1, "deepseek-v3")
    assert load_text(tmp_path) is None
    write_tokenizer(tmp_path, MIN_VOCABULARY, "deepseek-v3")
    text = load_text(tmp_path)
    assert text is not None and text.size == MIN_VOCABULARY


def test_truncation_in_the_file_does_not_cut_prompts(tmp_path: Path) -> None:
    text = make(tmp_path)
    long = "hello " * 50
    expected = text.encode(long)
    text.tokenizer.enable_truncation(4)
    text.tokenizer.enable_padding(length=512)
    text.tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = load_text(tmp_path)
    assert again is not None and again.encode(long) == expected


# --- conversations ---------------------------------------------------------------------------------------------------

TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "1"},
    {"role": "assistant", "content": "<think>why</think>2"},
    {"role": "user", "content": "3"},
]


@pytest.mark.parametrize(
    ("preset", "thinking", "end", "history"),
    [
        ("deepseek-v3", False, ASSISTANT, "<think>why</think>2"),
        ("deepseek-r1", False, ASSISTANT + THINK + "\n", "2"),
        ("deepseek-v3.1", False, ASSISTANT + END_THINK, END_THINK + "2"),
        ("deepseek-v3.1", True, ASSISTANT + THINK, END_THINK + "2"),
    ],
)
def test_conversation_formats(preset: str, thinking: bool, end: str, history: str, tmp_path: Path) -> None:
    """As spec V3 8 lays them out."""
    text = make(tmp_path, preset)
    assert text.render([{"role": "user", "content": "1"}], thinking=thinking) == f"{BOS}{USER}1{end}"
    expected = f"{BOS}S{USER}1{ASSISTANT}{history}{EOS}{USER}3{end}"
    assert text.render(TURNS, thinking=thinking) == expected
    ids = text.encode_chat(TURNS, thinking=thinking)
    assert text.tokenizer.decode(ids, skip_special_tokens=False) == expected
    for token in (USER, ASSISTANT, THINK, END_THINK):
        assert ids.count(text.tokenizer.token_to_id(token) or -1) == expected.count(token), token


def test_content_is_not_html_escaped(tmp_path: Path) -> None:
    text = edit_settings(make(tmp_path), chat_template="{{ messages[0]['content'] }}{{ messages | tojson }}")
    message = {"role": "user", "content": "<b> & '你'"}
    expected = message["content"] + json.dumps([message], ensure_ascii=False)
    assert text.render([message]) == expected


def test_template_with_loop_controls_and_indented_json(tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ m | tojson(indent=2) }}{% break %}{% endfor %}"
    message = {"role": "user", "content": "x"}
    assert edit_settings(make(tmp_path), chat_template=source).render([message, message]) == json.dumps(
        message, indent=2
    )


def test_messages_are_not_changed_by_rendering(tmp_path: Path) -> None:
    text = edit_settings(make(tmp_path), chat_template="{% set x = messages.pop() %}")
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(InputError, match="SecurityError"):
        text.render(messages)
    assert messages == [{"role": "user", "content": "x"}]


def test_named_templates(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": "right"}]
    text = edit_settings(make(tmp_path), chat_template=templates)
    assert text.render([{"role": "user", "content": "x"}]) == "right"


def test_template_file_comes_first(tmp_path: Path) -> None:
    """transformers 5 saves the template beside the settings."""
    make(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file", encoding="utf-8")
    text = load_text(tmp_path)
    assert text is not None
    assert text.render([{"role": "user", "content": "x"}]) == BOS + "file"


def test_no_template(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    text = load_text(tmp_path)
    assert text is not None and text.bos is None and text.eos is None
    with pytest.raises(InputError, match="chat template"):
        text.render([{"role": "user", "content": "x"}])


# --- reasoning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "output", "expected"),
    [
        ("<think>\n", "because\n</think>\n\n42", ("because", "42")),  # R1: the prompt opened the block
        ("<think>", "because</think>42", ("because", "42")),  # V3.1, thinking
        ("</think>", "42", ("", "42")),  # V3.1, not thinking
        ("A", "42", ("", "42")),
        ("A", "<think>because</think>42", ("because", "42")),
        ("A", "<think></think>42", ("", "42")),
        ("A", "<think>\n\n</think>\n\n42", ("", "42")),
        ("<think>\n", "cut off", ("cut off", "")),
        ("A", "<think>cut off", ("cut off", "")),
        ("<think>\n", "a</think>b</think>c", ("a", "b</think>c")),
        ("A", "the tag <think> in text", ("", "the tag <think> in text")),
        ("<think>\n", "", ("", "")),
        ("A", "", ("", "")),
    ],
)
def test_split_thinking(prompt: str, output: str, expected: tuple[str, str]) -> None:
    assert split_thinking(prompt, output) == expected
