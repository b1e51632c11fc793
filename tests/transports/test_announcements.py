"""Uploads that are of something else than the round's broadcast are refused by every transport."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcore.data.announcement import Announcement
from fedcore.data.base_identity import BaseIdentity
from fedcore.errors import FedcoreError
from fedcore.federation.state import read_state, write_state
from fedcore.methods import create_method
from tests.property.method_rounds import random_row
from tests.property.transports import ANNOUNCING, Federation, Sent, start_adapter


def base_of(value: str, template: str = "t" * 16) -> BaseIdentity:
    entries = {
        "quantisation": {"embed.weight": "float32 4x4", "q.weight": "float32 4x4"},
        "weights": {"embed.weight": "0" * 16, "q.weight": value},
        "template": {"chat_template": template},
    }
    return BaseIdentity.of("sampled", entries)


BASE, OTHER = base_of("1" * 16), base_of("2" * 16)


def opened(transport: str, folder: Path, on_invalid: Any = "drop") -> Federation:
    method = create_method("fedit")
    return ANNOUNCING[transport](method, start_adapter("lora"), folder, on_invalid=on_invalid)


Says = Callable[[Announcement], Announcement]


def own(federation: Federation, base: BaseIdentity = BASE) -> Says:
    """What an honest client answers."""
    scaling = dict(federation.start.scaling)
    return lambda announced: announced.answer(base, kind={"peft_type": "LORA"}, scaling=scaling)


def honest(federation: Federation) -> list[Sent]:
    t, layout, dtype = federation.state.round, federation.upload_layout, federation.state.row.dtype
    return [
        Sent(
            f"node-{n}",
            random_row(layout, 10 * t + n).to(dtype),
            float(n),
            says=own(federation),
        )
        for n in (1, 2, 3)
    ]


def scaled(said: Announcement, factor: float) -> Announcement:
    return replace(said, scaling={module: factor * s for module, s in said.scaling.items()})


FAULTS: dict[str, tuple[Says, str]] = {
    "another round": (
        lambda said: replace(said, round=said.round - 1),
        "its upload is for round 0",
    ),
    "a later round": (
        lambda said: replace(said, round=said.round + 1),
        "its upload is for round 2",
    ),
    "another broadcast": (
        lambda said: replace(said, broadcast="0" * 64),
        "it started from another broadcast than this server's",
    ),
    "no broadcast": (
        lambda said: replace(said, broadcast=""),
        "it started from another broadcast than this server's",
    ),
    "another alpha": (lambda said: scaled(said, 4.0), "has scaling 8, the server's is 2"),
    "rsLoRA": (lambda said: scaled(said, sqrt(3)), "has scaling 3.4641, the server's is 2"),
    "another kind": (
        lambda said: replace(said, kind={"peft_type": "GRAM"}),
        "its adapter has peft_type = 'GRAM', the server's 'LORA'",
    ),
    "another base": (
        lambda said: replace(said, base=OTHER),
        "its base differs from the server's in its weights, first q.weight; load",
    ),
    "another base, without its tensors": (
        lambda said: replace(said, base=OTHER.brief),
        "its base differs from the server's in its weights; load",
    ),
    "another template": (
        lambda said: replace(said, base=base_of("1" * 16, "u" * 16)),
        "its base differs from the server's in its template, first chat_template; set",
    ),
}


def reasons(federation: Federation) -> dict[str, str]:
    return {drop["client"]: drop["reason"] for drop in federation.state.record["dropped"]}


FOLDER_FAULTS = ("another broadcast", "another alpha", "another kind", "another base")
"""Those tried with folders, which are synced to the disk, in every run of the tests."""

PAIRS = [
    pytest.param(
        transport,
        fault,
        marks=[pytest.mark.exhaustive]
        if transport == "folders" and fault not in FOLDER_FAULTS
        else [],
    )
    for transport in ANNOUNCING
    for fault in FAULTS
]


@pytest.mark.parametrize(("transport", "fault"), PAIRS)
def test_an_upload_of_something_else_is_refused_by_name(
    transport: str, fault: str, tmp_path: Path
) -> None:
    change, message = FAULTS[fault]
    federation, without = (opened(transport, tmp_path / name) for name in ("with", "without"))
    for each in (federation, without):
        assert each.play(honest(each)).dropped == ()
    uploads = honest(federation)
    says = own(federation)
    bad = replace(uploads[1], says=lambda announced: change(says(announced)))
    outcome = federation.play([uploads[0], bad, uploads[2]])
    assert outcome.dropped == ("node-2",)
    assert message in reasons(federation)["node-2"]
    others = honest(without)
    expected = without.play([others[0], others[2]])
    assert torch.equal(outcome.row, expected.row)
    # It may come back.
    assert federation.play(honest(federation)).dropped == ()


@pytest.mark.parametrize("transport", list(ANNOUNCING))
def test_a_reply_that_is_played_again_is_refused(transport: str, tmp_path: Path) -> None:
    federation = opened(transport, tmp_path)
    first, recorded = honest(federation), []
    says = own(federation)

    def listening(announced: Announcement) -> Announcement:
        recorded.append(says(announced))
        return recorded[-1]

    federation.play([replace(first[0], says=listening), *first[1:]])
    later = honest(federation)
    outcome = federation.play([replace(first[0], says=lambda _: recorded[0]), *later[1:]])
    assert outcome.dropped == ("node-1",)
    assert reasons(federation)["node-1"] == "its upload is for round 0"


@pytest.mark.parametrize("transport", [name for name in ANNOUNCING if name != "folders"])
def test_who_once_said_what_it_is_of_has_to_say_it_again(transport: str, tmp_path: Path) -> None:
    """A replay of what a transport carried before it carried announcements would say nothing."""
    federation = opened(transport, tmp_path)
    silent = [replace(sent, says=None) for sent in honest(federation)]
    assert federation.play(silent).dropped == ()
    assert federation.play(honest(federation)).dropped == ()
    uploads = honest(federation)
    outcome = federation.play([replace(uploads[0], says=None), *uploads[1:]])
    assert outcome.dropped == ("node-1",)
    assert "it does not say which round and broadcast it is of" in reasons(federation)["node-1"]
    # The state remembers it.
    again = read_state(write_state(federation.state, tmp_path / "kept"))
    assert again.repeating == ("node-1", "node-2", "node-3")
    assert again.agreed == federation.state.agreed


@pytest.mark.parametrize("transport", list(ANNOUNCING))
def test_the_base_that_most_clients_hold_becomes_the_federations(
    transport: str, tmp_path: Path
) -> None:
    federation = opened(transport, tmp_path)
    assert federation.announced().base is None
    uploads = honest(federation)
    outcome = federation.play([replace(uploads[0], says=own(federation, OTHER)), *uploads[1:]])
    assert outcome.dropped == ("node-1",)
    reason = reasons(federation)["node-1"]
    assert "its base differs from node-2's in its weights, first q.weight" in reason
    assert (
        "if node-2 is the one that is wrong, give the server its adapter_config or base" in reason
    )
    base = BaseIdentity.from_json(federation.state.agreed["base"], "state")
    assert base == BASE
    # Who joins later is compared with it; clients that say nothing of a base may stay.
    uploads = honest(federation)
    outcome = federation.play(
        [
            replace(uploads[0], says=own(federation, OTHER)),
            replace(uploads[1], says=lambda a: replace(own(federation)(a), base=None)),
            uploads[2],
        ]
    )
    assert outcome.dropped == ("node-1",)
    assert (
        "differs from the server's in its weights, first q.weight"
        in (reasons(federation)["node-1"])
    )


def test_clients_of_an_app_are_compared_where_the_server_knows_no_scaling(tmp_path: Path) -> None:
    """One client of alpha 32 beside two of alpha 8."""
    federation = opened("flower", tmp_path)
    uploads, says = honest(federation), own(federation)
    bad = replace(uploads[2], says=lambda announced: scaled(says(announced), 4.0))
    assert federation.play([*uploads[:2], bad]).dropped == ("node-3",)
    assert "has scaling 8, node-1's is 2" in reasons(federation)["node-3"]


@pytest.mark.parametrize("transport", list(ANNOUNCING))
def test_a_refusal_ends_a_round_that_does_not_drop(transport: str, tmp_path: Path) -> None:
    federation = opened(transport, tmp_path, on_invalid="raise")
    uploads, says = honest(federation), own(federation)
    bad = replace(uploads[1], says=lambda a: replace(says(a), broadcast="0" * 64))
    before = federation.state
    with pytest.raises(FedcoreError, match="round 0: client node-2: it started from another"):
        federation.play([uploads[0], bad, uploads[2]])
    assert federation.state is before
