"""What counts as the right number, text and formula."""

from decimal import Decimal

import pytest

from fedcore.answers.marking import (
    is_numeric,
    normalised,
    number_in,
    same_formula,
    same_number,
    same_text,
    until,
)
from fedcore.errors import MissingExtraError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", "1234"),
        ("$1,000.00", "1000"),
        ("12 + 3 = 15", "15"),
        ("She has 5.\n#### 72", "72"),
        ("#### 72 apples, of 80", "72"),
        ("first #### 1 then\n#### 2", "2"),
        ("the mark alone: 7 ####", "7"),
        ("-3", "-3"),
        ("10-4", "4"),
        ("it is -$1,250.5.", "-1250.5"),
        ("one of 1,2,3", "3"),
        ("12,34", "34"),
        ("half is .5", "0.5"),
        ("1e3", "1000"),
        ("50%", "50"),
        ("0.1000", "0.1"),
        ("123456789012345678901234567890123.5", "123456789012345678901234567890123.5"),
    ],
)
def test_the_number_of_a_text(text, value):
    assert number_in(text) == Decimal(value)
    assert same_number(text, value)


def test_decimals_are_exact():
    long = "0." + "1" * 40
    assert same_number(long, long)
    assert not same_number(long, "0." + "1" * 39 + "2")
    assert not same_number("0.3", "0.30000000000000004")


@pytest.mark.parametrize("text", ["", "none", "####", "1e999999999999999999999"])
def test_a_text_without_a_number_is_wrong(text):
    assert number_in(text) is None
    assert not same_number(text, "0")


def test_an_invented_next_question_is_cut():
    text = " 12 + 3 = 15\n\nQuestion: what is 90 + 9?\nAnswer: 99"
    assert number_in(text) == 99
    assert number_in(until(text, ("Question:", "\n\n"))) == 15
    assert until(text, ()) == text
    # The first in the text, whatever their order.
    assert until("a b c", ("c", "b")) == "a "


@pytest.mark.parametrize(
    ("answer", "numeric"),
    [("15", True), ("$1,000", True), ("so\n#### 7", True), ("7 apples", False), ("Paris", False)],
)
def test_which_answers_are_numbers(answer, numeric):
    assert is_numeric(answer) is numeric


def test_texts_are_equal_but_for_case_blanks_and_punctuation_around():
    assert same_text("  The  Eiffel\nTower.", "the eiffel tower")
    assert same_text('"Paris"!', "paris")
    assert not same_text("Paris, France", "Paris")
    assert normalised("A-B") == "a-b"


def test_formulas_need_their_package():
    try:
        import math_verify  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r"fedcore-lora\[answers\]"):
            same_formula("1/2", "0.5")
    else:
        assert same_formula("the answer is $\\frac{1}{2}$", "0.5")
        assert not same_formula("$\\frac{1}{3}$", "0.5")
