"""Patterns match what PEFT's regular expressions match, in a time that no pattern can stretch."""

from __future__ import annotations

import re
import warnings
from contextlib import suppress
from time import perf_counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedcore.data.adapter_state import declared_rank_and_scaling
from fedcore.data.patterns import first_match
from fedcore.errors import FedcoreError

LONG = "base.encoder.layer.0.attention.self.query"
PATHS = (
    LONG,
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "transformer.h.3.attn.c_attn",
    "q",
    "a.b",
    "aab.ba-b.0",
    "0.1.0",
    "",
    ".",
    "a.",
    "é.b",
)


def peft_match(pattern: str, path: str) -> bool:
    """What PEFT's get_pattern_key does with one key."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.match(rf"(.*\.)?({pattern})$", path) is not None


@pytest.mark.parametrize(
    "pattern",
    [
        "query",
        "self.query",
        r"layer\.0\..*query",
        r".*\.query",
        "^" + re.escape(LONG),
        "^" + re.escape(LONG) + "$",
        "^query",
        r"layers\.(0|1|11)\.self_attn\.(q|k|v)_proj",
        r"layers\.\d+\.self_attn\.q_proj",
        r"layers\.[0-9]+\..*_proj",
        r"layers\.1[^.]*\..*",
        r"\w+\.1\..*",
        "q_proj|query|c_attn",
        "layers.0.*q_proj",
        r"h\.\d\.attn\.(?:c_attn|c_proj)",
        r"layers\.1?1\..*?q_proj",
        "(a|b)*",
        "(a+)+b",
        "",
        "|q",
        "()",
        "a.",
        "[a-c]",
        r"[\d.]+",
        "[^a]",
        "a^b",
        "a$|q$",
        r"b\-b",
        "é",
        "query ",
    ],
)
def test_patterns_that_people_write_match_what_peft_matches(pattern: str) -> None:
    for path in PATHS:
        assert (first_match((pattern,), path) == 0) == peft_match(pattern, path), path


CHARACTERS = st.sampled_from([*"ab01_-é", r"\.", ".", r"\d", r"\w", "[ab]", "[^.]", "[0-9a]"])


@st.composite
def patterns(draw: st.DrawFn, depth: int = 2) -> str:
    """Regular expressions of the safe subset, nested a little."""
    if depth == 0:
        return draw(CHARACTERS)
    parts = []
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            part = draw(CHARACTERS)
        else:
            inner = draw(st.lists(patterns(depth=depth - 1), min_size=1, max_size=3))
            part = f"({draw(st.sampled_from(['', '?:']))}{'|'.join(inner)})"
        parts.append(part + draw(st.sampled_from(["", "", "", "*", "+", "?", "*?", "+?", "??"])))
    start, end = draw(st.sampled_from([("", ""), ("", ""), ("^", ""), ("", "$"), ("^", "$")]))
    return start + "".join(parts) + end


@given(
    st.lists(patterns(), min_size=1, max_size=4),
    st.text(alphabet="ab01._-é", max_size=8) | st.sampled_from(PATHS),
)
@example(["(a*)*", "b"], "aab.ba-b.0")
@example(["(a?|b*)+"], "")
@example(["^a*b", "(^a|b)"], "a.b")
def test_the_first_pattern_that_matches_is_that_of_re(keys: list[str], path: str) -> None:
    expected = next((i for i, key in enumerate(keys) if peft_match(key, path)), None)
    assert first_match(tuple(keys), path) == expected


@given(st.lists(st.sampled_from(["a.b", "a\\.b", "^a.b", "b", "a", "^b$", ".b", "..", "x.b"])))
def test_patterns_of_a_fixed_length_are_found_in_their_order(keys: list[str]) -> None:
    for path in ("a.b", "axb", "x.a.b", "b", "a", "x.b", "xx", "q.xx"):
        expected = next((i for i, key in enumerate(keys) if peft_match(key, path)), None)
        assert first_match(tuple(keys), path) == expected, path


BOMBS = [
    "(.|.)*X",
    "(.?.?)*X",
    ".*" * 9 + "X",
    "(a+)+X",
    "(.*)*X",
    "((.*)*)*X",
    r"(\w+\w+)+X",
    "([a-z.]+)+X",
    "(a|a|aa)*X",
    "(.*|.*)*X",
    ".*" * 300 + "X",
    "(" * 30 + "." + ")*" * 30 + "X",
    "|".join(["(.*a.*)*"] * 40),
    "(?:a?){25}a{25}",
    r"(.)\1*X",
    "(?=(.*)*)X",
]


@pytest.mark.parametrize("pattern", BOMBS, ids=lambda p: p[:20])
def test_a_pattern_costs_no_time(pattern: str) -> None:
    """Each of them keeps ``re`` busy for more than six seconds, or for ever."""
    began = perf_counter()
    config = {"r": 3, "lora_alpha": 6, "rank_pattern": {pattern: 3}}
    for i in range(50):
        for path in (f"{LONG}.{i}", f"model.{'a' * 60}.{i}"):
            with suppress(FedcoreError):
                assert declared_rank_and_scaling(config, path) == (3, 2.0)
    assert perf_counter() - began < 2.5


def test_many_patterns_cost_little_time() -> None:
    paths = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(12) for j in range(100)]
    config = {"r": 1, "lora_alpha": 1, "rank_pattern": {p: n + 2 for n, p in enumerate(paths)}}
    began = perf_counter()
    found = [declared_rank_and_scaling(config, path)[0] for path in paths]
    assert found == list(range(2, len(paths) + 2))
    assert perf_counter() - began < 2.5


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "it ends within a group"),
        ("a)", r"a \) closes nothing"),
        ("a)(b", r"a \) closes nothing"),
        ("[a", "it ends within a group, a class"),
        ("[]", "a class is empty"),
        ("[z-a]", "a range that is not one"),
        (r"[\d-z]", "a range that is not one"),
        ("a**", "a repetition is repeated"),
        ("a*+", "a repetition is repeated"),
        ("*a", r"\* is not understood here"),
        ("^*", r"\* repeats nothing"),
        ("a{2}", r"\{ is not understood here"),
        (r"(a)\1", r"\\1 is not understood"),
        (r"a\b", r"\\b is not understood"),
        ("(?i)a", r"\(\? is not understood"),
        ("(?=a)a", r"\(\? is not understood"),
        ("a\\", "it ends within"),
        ("a" * 1001, "it has 1001 characters"),
        ("(" * 40 + "a" + ")" * 40, "nests more than 32 groups"),
    ],
)
def test_what_is_not_understood_is_refused_with_what_to_write(pattern: str, reason: str) -> None:
    config = {"r": 3, "lora_alpha": 6, "alpha_pattern": {pattern: 3}}
    with pytest.raises(FedcoreError, match=rf"alpha_pattern: the pattern .* {reason}") as caught:
        declared_rank_and_scaling(config, LONG)
    assert "name each module by its path" in str(caught.value)


def test_too_many_patterns_are_refused() -> None:
    with pytest.raises(FedcoreError, match="20000 patterns are too many"):
        first_match(tuple(f"m{i}" for i in range(20_000)), LONG)
    with pytest.raises(FedcoreError, match="with those before it, it is too long"):
        first_match(tuple(f"a*{'b' * 900}{i}" for i in range(4)), LONG)


def test_keys_of_another_type_and_paths_of_several_lines_are_refused() -> None:
    with pytest.raises(FedcoreError, match="its keys are patterns"):
        declared_rank_and_scaling({"r": 1, "lora_alpha": 1, "rank_pattern": {3: 3}}, LONG)
    with pytest.raises(FedcoreError, match=r"a\\nb is not the path of a module"):
        first_match(("a",), "a\nb")
