"""A small byte-level BPE tokenizer with DeepSeek's special tokens, for synthetic checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from dsjax.text import END_THINK, THINK

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
_SPECIAL = (BOS, EOS, PAD)
_MARKERS = (USER, ASSISTANT, THINK, END_THINK)
_MAX_VOCABULARY = 8192
MIN_VOCABULARY = len(_SPECIAL) + len(_MARKERS) + 256

_TURNS = (
    "{% set ns = namespace(system='') %}"
    "{% for m in messages if m['role'] == 'system' %}{% set ns.system = ns.system + m['content'] %}{% endfor %}"
    "{{ bos_token }}{{ ns.system }}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + ANSWER + eos_token }}{% endif %}"
    "{% endfor %}"
)
_AFTER_THINK = "m['content'].split('</think>')[-1]"

# As spec V3 8 describes each generation's conversation format.
_TEMPLATES = {
    "deepseek-r1": _TURNS.replace("ANSWER", _AFTER_THINK)
    + "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}",
    "deepseek-v3.1": _TURNS.replace("ANSWER", "'</think>' + " + _AFTER_THINK)
    + "{% if add_generation_prompt %}{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{% endif %}",
}
_WITHOUT_TEMPLATE = ("deepseek-v4-flash", "deepseek-v4-pro")  # V4's encoding is a program, no template (spec V4 8)
_PLAIN = _TURNS.replace("ANSWER", "m['content']") + "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"


def write_tokenizer(folder: Path, vocab_size: int, template: str) -> None:
    """Writes tokenizer.json and tokenizer_config.json, trained on Python's own help texts.

    Nothing is written where `vocab_size` has no room for the bytes and special tokens; such a checkpoint takes ids.

    Args:
      folder: where to.
      vocab_size: the model's; the tokenizer has at most as many tokens.
      template: the preset whose chat template to write, if it has one.
    """
    if vocab_size < MIN_VOCABULARY:
        return
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, _MAX_VOCABULARY),
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in _SPECIAL]
        + [AddedToken(t, special=False, normalized=False) for t in _MARKERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((topics[name] for name in sorted(topics)), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
    }
    if template not in _WITHOUT_TEMPLATE:
        config["chat_template"] = _TEMPLATES.get(template, _PLAIN)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
