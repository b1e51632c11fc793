"""The record that broadcasts announce and uploads repeat."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.data.adapter_kind import kind_of
from fedcore.data.announcement import Announcement, differences
from fedcore.data.base_identity import BaseIdentity
from fedcore.errors import FedcoreError

NAMES = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=8)
SCALINGS = st.dictionaries(NAMES, st.floats(1e-6, 1e6), max_size=4)
BASES = st.builds(
    BaseIdentity.of,
    st.sampled_from(["sampled", "full"]),
    st.dictionaries(st.sampled_from(["config", "weights"]), st.dictionaries(NAMES, NAMES)),
)
ANNOUNCEMENTS = st.builds(
    Announcement,
    st.integers(0, 10**6),
    st.text(max_size=64),
    st.dictionaries(NAMES, st.one_of(st.booleans(), st.text(max_size=5))),
    SCALINGS,
    st.one_of(st.none(), BASES),
    st.lists(st.sampled_from(["template", "weights"]), unique=True).map(tuple),
)


@given(ANNOUNCEMENTS)
def test_what_is_written_is_read(announced: Announcement) -> None:
    assert Announcement.parse(announced.text(), "site-1") == announced
    assert differences(announced, announced) == (None, ())


@settings(max_examples=50)
@given(ANNOUNCEMENTS, ANNOUNCEMENTS)
def test_equal_in_what_is_known_or_refused(one: Announcement, other: Announcement) -> None:
    problem, _ = differences(one, other)
    known = [f.name for f in fields(other) if f.name != "allow" and getattr(other, f.name)]
    equal = one.round == other.round and all(
        getattr(one, name) == getattr(other, name) for name in known
    )
    if equal:
        assert problem is None
    elif problem is None:
        # What is not compared: further scalings and parts.
        assert one.round == other.round
        assert one.scaling.items() >= other.scaling.items()
        assert not other.kind or one.kind == other.kind
        assert not other.broadcast or one.broadcast == other.broadcast


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a text of this protocol"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "it names no round"),
        ('{"round": true}', "round is True; it must be an integer"),
        ('{"round": 0, "broadcast": 1}', "broadcast is 1; it must be a text"),
        ('{"round": 0, "scaling": {"q": NaN}}', "it must be an object of finite numbers"),
        (f'{{"round": 0, "scaling": {{"q": 1{"0" * 400}}}}}', "an object of finite numbers"),
        ('{"round": 0, "kind": []}', "kind is \\[\\]; it must be an object"),
        ('{"round": 0, "base": {}}', "its base identity has no mode"),
        ('{"round": 0, "allow": "all"}', "allow is 'all'; it must be a list of texts"),
        ('{"round": 0, "allow": ["weight"]}', "did you mean weights"),
    ],
)
def test_what_is_no_announcement_is_said(text: object, message: str) -> None:
    with pytest.raises(FedcoreError, match=message):
        Announcement.parse(text, "site-1")


def test_further_keys_are_left_alone() -> None:
    about = {**Announcement(3).to_json(), "added": "later"}
    assert Announcement.parse(json.dumps(about), "site-1") == Announcement(3)


def test_a_client_answers_with_its_own_and_with_entries_only_where_they_are_needed() -> None:
    base = BaseIdentity.of("sampled", {"weights": {"w": "0" * 16}})
    other = BaseIdentity.of("sampled", {"weights": {"w": "1" * 16}})
    announced = Announcement(2, "b", {"k": 1}, {"q": 2.0}, base, ("weights",))
    said = announced.answer(base, kind={"k": 2}, scaling={"q": 1.0})
    assert said == Announcement(2, "b", {"k": 2}, {"q": 1.0}, base.brief)
    assert announced.answer(other, {}, {}).base == other
    assert replace(announced, base=None).answer(base, {}, {}).base == base
    assert differences(
        announced.answer(other, announced.kind, announced.scaling), announced, allow=("weights",)
    ) == (
        None,
        ("its base differs from the server's in its weights, first w, as allowed",),
    )


def test_kinds_are_those_of_configurations_on_disk_and_in_memory() -> None:
    from peft import LoraConfig

    assert kind_of(LoraConfig().to_dict()) == kind_of({"peft_type": "LORA"})
    assert kind_of({"r": 4}) == {}
