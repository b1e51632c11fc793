"""What errors quote of others cannot do anything to a terminal, a log or a page."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import FedcoreError, printable, unknown_name


@given(st.text(alphabet=st.characters(), max_size=50))
def test_foreign_text_is_printable_and_ordinary_text_stays(text):
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;evil\x07", r"\x1b]0;evil\x07"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\u2066\u200b\u2028", r"\u2066\u200b\u2028"),
        ("\ud800", r"\ud800"),
        ("Zürich 東京", "Zürich 東京"),
        (3, "3"),
    ],
)
def test_what_does_not_print_is_escaped(text, shown):
    assert printable(text) == shown


def test_long_text_is_cut():
    assert printable("a" * 10**6) == "a" * 197 + "..."
    assert printable("\x00" * 10**6, 10) == r"\x00\x0..."
    assert len(str(FedcoreError("x " * 10**6))) == 4000


def test_an_error_is_one_printable_line():
    error = FedcoreError("client a\x1b[2J\nround 9: client b: all is well")
    assert str(error) == r"client a\x1b[2J\nround 9: client b: all is well"
    assert str(unknown_name("method", "\x1b" * 5000, ["a"])).isprintable()


def test_a_word_without_end_does_not_hide_the_remedy():
    said = str(FedcoreError(f"the file lacks {'a' * 5000}; pass another one"))
    assert said.startswith("the file lacks aaa")
    assert said.endswith("... pass another one")
    assert len(said) < 500
    path = "/" + "/".join(["folder"] * 50)
    assert path in str(FedcoreError(f"cannot read {path}"))
