"""A state knows its files: what is not what was written is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.data.low_rank import LowRank
from fedcore.errors import FedcoreError
from fedcore.federation.checkpoints import begin, newest_good, newest_or, save
from fedcore.federation.seals import digest_of_content
from fedcore.federation.state import (
    ServerState,
    latest_state,
    prune_clients,
    read_state,
    state_folders,
    write_state,
)
from fedcore_kernels.layout import FactorLayout

LAYOUT = FactorLayout.build([("q", "A", 2, 5), ("q", "B", 2, 7)], [("head", (3,))])


def make(round: int, seed: int = 0) -> ServerState:
    random = torch.Generator().manual_seed(1000 * seed + round)
    return ServerState(
        round=round,
        layout=LAYOUT,
        row=torch.randn(LAYOUT.size, generator=random),
        simulated_clients={"c": {"step": torch.tensor(1000.0 * seed + round)}},
        residual={"q": LowRank(torch.randn(1, 7, generator=random), torch.ones(1, 5))},
        record={"round": round - 1, "loss": float("nan"), "whole": 3.0, "tiny": 1e-300},
        origin={"recipe": "0" * 64},
    )


def strip(folder: Path) -> None:
    """As version 0.1 wrote it."""
    file = folder / "state.json"
    about = json.loads(file.read_text())
    kept = {k: v for k, v in about.items() if k not in ("files", "origin", "seal")}
    file.write_text(json.dumps(kept))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    for round in range(3):
        write_state(make(round), folder)
    return folder


FILES = ("server.safetensors", "residual.safetensors", "clients.safetensors", "state.json")


@given(st.sampled_from(FILES), st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_is_refused_by_the_name_of_its_file(
    written: Path, name: str, place: int, bit: int
) -> None:
    file = written / "round-0002" / name
    whole = file.read_bytes()
    data = bytearray(whole)
    data[place % len(data)] ^= 1 << bit
    try:
        file.write_bytes(data)
        if name == "state.json":
            try:
                same = digest_of_content(json.loads(data)) == digest_of_content(json.loads(whole))
            except ValueError:
                same = False
            if same:  # 1e-300 may as well be written 1E-300.
                read_state(file.parent)
                return
        with pytest.raises(FedcoreError, match=rf"cannot read the state in .*round-0002: .*{name}"):
            read_state(file.parent)
    finally:
        file.write_bytes(whole)
    read_state(file.parent)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-2]),
    "lengthened": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "emptied": lambda file: file.write_bytes(b""),
    "deleted": lambda file: file.unlink(),
    "of the round before": lambda file: shutil.copy(
        file.parents[1] / "round-0001" / file.name, file
    ),
    "of another run": lambda file: shutil.copy(
        write_state(make(2, seed=1), file.parents[1] / "other") / file.name, file
    ),
    "made a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_file_that_is_not_the_one_that_was_written_is_refused_by_name(
    damage: str, name: str, tmp_path: Path
) -> None:
    for round in range(3):
        write_state(make(round), tmp_path)
    file = tmp_path / "round-0002" / name
    DAMAGE[damage](file)
    with pytest.raises(FedcoreError) as caught:
        newest_or(make(0), tmp_path)
    said = str(caught.value)
    if (damage, name) == ("of another run", "state.json"):
        name = "clients.safetensors"  # Every hash is of the other run's files, the first in order.
        assert "is not the file that was written with it" in said
    assert name in said
    assert "the newest good state is that of round 1: delete the later ones in" in said
    assert "\n" not in said
    later = tmp_path / "round-0002"
    shutil.rmtree(later)
    assert newest_or(make(0), tmp_path).round == 1


def test_a_state_that_was_renamed_is_of_another_round(tmp_path: Path) -> None:
    write_state(make(1), tmp_path)
    shutil.copytree(tmp_path / "round-0001", tmp_path / "round-0002")
    with pytest.raises(FedcoreError, match=r"round-0002: state.json is of round 1"):
        newest_or(make(0), tmp_path)


@pytest.mark.parametrize("spelling", ["indented", "spaced", "floats", "reordered"])
def test_how_a_number_or_a_line_is_written_does_not_matter(spelling: str, tmp_path: Path) -> None:
    file = write_state(make(2), tmp_path) / "state.json"
    about = json.loads(file.read_text())
    text = {
        "indented": json.dumps(about, indent=8),
        "spaced": file.read_text().replace(":", " : ") + "\n\n",
        "floats": file.read_text().replace("3.0", "0.3e1").replace("1e-300", "10E-301"),
        "reordered": json.dumps(dict(reversed(about.items()))),
    }[spelling]
    assert text != file.read_text()
    file.write_text(text)
    assert torch.equal(read_state(file.parent).row, make(2).row)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_the_hash_of_values_is_that_of_what_json_makes_of_them(values: object) -> None:
    assert digest_of_content(json.loads(json.dumps(values))) == digest_of_content(values)


def test_values_that_differ_have_hashes_that_differ() -> None:
    different = [0, 1, True, False, None, "1", "true", [1], [[1]], {"1": 1}, 0.1, 0.1 + 2**-56, ""]
    assert len({digest_of_content(value) for value in different}) == len(different)
    assert digest_of_content(1) == digest_of_content(1.0)


def test_states_of_the_first_version_read_and_do_not_follow_sealed_ones(tmp_path: Path) -> None:
    for round in range(2):
        strip(write_state(make(round), tmp_path))
    old = newest_or(make(0), tmp_path)
    assert (old.round, old.origin) == (1, {})
    save(make(2), tmp_path)
    assert newest_or(make(0), tmp_path).origin == make(2).origin
    save(make(3), tmp_path)
    strip(tmp_path / "round-0003")
    with pytest.raises(
        FedcoreError, match=r"round-0003: state.json has lost its hashes; the newest"
    ):
        newest_or(make(0), tmp_path)


@pytest.mark.parametrize("field", ["files", "origin", "seal"])
def test_a_state_that_lost_one_of_its_hashes_is_not_an_old_one(field: str, tmp_path: Path) -> None:
    file = write_state(make(0), tmp_path) / "state.json"
    about = json.loads(file.read_text())
    del about[field]
    file.write_text(json.dumps(about))
    with pytest.raises(FedcoreError, match=r"state.json is not what was written"):
        read_state(file.parent)


def test_rounds_are_ordered_by_number_and_not_by_their_names(tmp_path: Path) -> None:
    rounds = [9, 10, 999, 9998, 9999, 10000, 10001]
    for round in rounds:
        write_state(make(round), tmp_path)
    assert list(state_folders(tmp_path)) == rounds
    assert latest_state(tmp_path) == tmp_path / "round-10001"
    prune_clients(tmp_path, 2)
    with_clients = {path.parent.name for path in tmp_path.glob("*/clients.safetensors")}
    assert with_clients == {"round-10000", "round-10001"}
    assert newest_or(make(0), tmp_path).round == 10001


def test_names_that_are_no_rounds_are_not_looked_at(tmp_path: Path) -> None:
    write_state(make(1), tmp_path)
    for name in ("round-x", "round-0002.bak", "round-", "round--3", "round-٣"):
        shutil.copytree(tmp_path / "round-0001", tmp_path / name)
    assert list(state_folders(tmp_path)) == [1]
    assert newest_or(make(0), tmp_path).round == 1


def test_a_pruned_state_can_be_read_and_not_continued_from(tmp_path: Path) -> None:
    for round in range(4):
        write_state(make(round), tmp_path)
    prune_clients(tmp_path, 2)
    pruned = tmp_path / "round-0001"
    with pytest.raises(
        FedcoreError, match=r"clients.safetensors is missing, which only the newest 2"
    ):
        read_state(pruned)
    again = read_state(pruned, clients=False)
    assert torch.equal(again.row, make(1).row)
    assert again.simulated_clients == {}
    (tmp_path / "round-0003" / "server.safetensors").write_bytes(b"")
    assert newest_good(state_folders(tmp_path)) == 2
    (tmp_path / "round-0002" / "server.safetensors").write_bytes(b"")
    assert newest_good(state_folders(tmp_path)) is None


def test_states_after_a_damaged_record_are_not_offered(tmp_path: Path) -> None:
    for round in range(4):
        write_state(make(round), tmp_path)
    (tmp_path / "round-0002" / "state.json").write_text("{}")
    assert newest_good(state_folders(tmp_path)) == 1


def test_what_another_process_has_continued_is_not_overwritten(tmp_path: Path) -> None:
    mine = begin(tmp_path, False, make(0))
    save(make(1, seed=5), tmp_path)
    with pytest.raises(
        FedcoreError, match=r"holds the state of round 1 already, which something else"
    ):
        save(make(mine.round + 1), tmp_path)
    assert torch.equal(newest_or(make(0), tmp_path).row, make(1, seed=5).row)
    with pytest.raises(FedcoreError, match="holds states already; pass resume=True"):
        begin(tmp_path, False, make(0))
