from __future__ import annotations

from math import inf, nan

import pytest

from fedcore.checks import choice, count, flag, is_integer, is_number, number
from fedcore.errors import FedcoreError

NOT_NUMBERS = ("1", None, True, 1j, [1])


def test_a_value_that_fits_is_returned_as_it_is():
    assert number("m", "x", 1) == 1
    assert type(number("m", "x", 1)) is int
    assert number("m", "x", 0.0, least=0, below=1) == 0
    assert number("m", "x", 1, above=0, most=1) == 1
    assert count("m", "x", -3) == -3
    assert count("m", "x", 4, least=4, most=4) == 4
    assert choice("m", "x", "a", ("a", "b")) == "a"
    assert flag("m", "x", False) is False


@pytest.mark.parametrize(
    ("bounds", "wanted", "outside"),
    [
        ({}, "a finite number", ()),
        ({"above": 0}, "a finite number above 0", (0, -1)),
        ({"least": 0}, "a finite number >= 0", (-1e-300,)),
        ({"least": 0, "most": 1}, "a number in [0, 1]", (-1, 1.5)),
        ({"least": 0, "below": 1}, "a number in [0, 1)", (-1, 1)),
        ({"above": 0, "most": 1}, "a number in (0, 1]", (0, 2)),
        ({"most": 2}, "a number in (-inf, 2]", (3,)),
    ],
)
def test_a_number_is_finite_and_within_its_bounds(bounds, wanted, outside):
    for value in (*outside, inf, -inf, nan, *NOT_NUMBERS):
        with pytest.raises(FedcoreError) as caught:
            number("method", "option", value, **bounds)
        assert str(caught.value) == f"method: option is {value!r}; pass {wanted}"


@pytest.mark.parametrize(
    ("bounds", "wanted", "outside"),
    [
        ({}, "an integer", ()),
        ({"least": 1}, "an integer of 1 or more", (0, -1)),
        ({"least": 1, "most": 9}, "an integer from 1 to 9", (0, 10)),
        ({"most": 9}, "an integer of 9 or less", (10,)),
    ],
)
def test_a_count_is_an_integer_within_its_bounds(bounds, wanted, outside):
    for value in (*outside, 1.0, inf, nan, *NOT_NUMBERS):
        with pytest.raises(FedcoreError) as caught:
            count("", "option", value, **bounds, otherwise=", or None")
        assert str(caught.value) == f"option is {value!r}; pass {wanted}, or None"


def test_a_name_or_a_truth_value_is_nothing_else():
    for value in ("bot", None, ["both"]):
        with pytest.raises(FedcoreError, match="unknown reference of fedrot") as caught:
            choice("fedrot", "reference", value, ("both", "alternate"))
    with pytest.raises(FedcoreError, match="unknown frame 'qrs'; did you mean qr"):
        choice("", "frame", "qrs", ("qr", "structured"))
    for value in (0, 1, "yes", None):
        with pytest.raises(FedcoreError) as caught:
            flag("", "offset", value)
        assert str(caught.value) == f"offset is {value!r}; pass true or false"


def test_a_long_value_is_cut():
    with pytest.raises(FedcoreError) as caught:
        number("", "x", "9" * 5000)
    assert len(str(caught.value)) < 120


def test_truth_values_are_no_numbers():
    assert is_number(1.5)
    assert is_number(10**400)
    assert is_integer(3)
    assert not is_integer(3.0)
    assert not is_number(True)
    assert not is_integer(False)
