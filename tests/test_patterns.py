"""Plain expressions: as Python's `re.match` where both take them, in time pattern x name, and nothing beyond."""

from __future__ import annotations

import random
import re
import time

import pytest

from dsjax.config.patterns import PlainExpression

NAMES = (
    "",
    "lm_head",
    "model.embed_tokens",
    "model.layers.0.self_attn.q_a_proj",
    "model.layers.11.mlp.gate",
    "model.layers.3.mlp.gate_proj",
    "model.layers.3.mlp.gate_up_proj.x",
    "model.layers.3.mlp.experts.12.up_proj",
    "model.layers.3.mlp.experts.x.up_proj",
    "model.layers.3.mlp.shared_experts.down_proj",
    "model.layers.61.eh_proj",
    "re:model.layers-1",
)
USUAL = (
    ".*lm_head",
    "re:.*lm_head",
    r".*mlp\.gate$",
    ".*mlp.gate",
    r"^model\.layers\.[0-3]\..*$",
    r".*mlp\.(gate|up|gate_up|down)_proj.*",
    r".*\.experts\.\d+\..*",
    r".*\.experts\.\d+\.",
    ".*self_attn.*",
    ".*shared_experts?.*",
    r"(?:model|lm)_?.*head",
    r"model\.layers\.(\d|[1-5]\d|60)\..*",
    r"model\.[^l][\w.\-]+$",
    "(model|)(.*)(|x)$",
    "",
    "$",
    "^",
)


def agree(pattern: str, name: str) -> None:
    assert PlainExpression(pattern).match(name) == (re.match(pattern, name) is not None), (pattern, name)


@pytest.mark.parametrize("pattern", USUAL)
def test_as_re(pattern: str) -> None:
    for name in NAMES:
        agree(pattern, name)


def test_as_re_at_random() -> None:
    rng = random.Random(1)

    def items(count: int) -> str:
        kinds = ("a", "b", "1", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[0-9b.]", r"[\d\-a]", "[^.-]")
        return "".join(rng.choice(kinds) + rng.choice(("", "", "*", "+", "?")) for _ in range(count))

    matched = 0
    for _ in range(6000):
        pattern = rng.choice(("", "^")) + items(rng.randint(0, 4))
        for _ in range(rng.randint(0, 2)):
            choices = "|".join(items(rng.randint(0, 2)) for _ in range(rng.randint(1, 3)))
            pattern += f"{rng.choice(('(', '(?:'))}{choices}){items(rng.randint(0, 2))}"
        pattern += rng.choice(("", "$"))
        for _ in range(3):
            name = "".join(rng.choice("ab1.-") for _ in range(rng.randint(0, 7)))
            agree(pattern, name)
            matched += PlainExpression(pattern).match(name)
    assert 3000 < matched < 15000


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+!",
        "([a-z0-9_.]+)+!",
        "(.|.)*x",
        "(a|b){30}",
        "a{3}",
        "(?x)a",
        "(?!x).*",
        "(?P<x>a)",
        r"(a)\1",
        r"\bab",
        r"\s",
        "((a|b)c|d)",
        "a|b",
        "a**",
        "a*?",
        "a*+",
        "*",
        "(",
        ")",
        "(a",
        "(a$)",
        "a$b",
        "a^",
        "[",
        "[]",
        "[a",
        "[z-a]",
        "[a--b]",
        "[[:alpha:]]",
        "\\",
    ],
)
def test_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="not a plain expression"):
        PlainExpression(pattern)


@pytest.mark.parametrize(
    "pattern", [".*" * 40 + "!", ".?" * 200 + "!", "(.*|.*)" * 40 + "!", "a*" * 40 + "a" * 40 + "!"]
)
def test_time(pattern: str) -> None:
    """What takes `re` for ever."""
    start = time.process_time()
    assert not PlainExpression(pattern).match("a" * 200)
    assert time.process_time() - start < 5
