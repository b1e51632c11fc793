import pytest
import torch

from fedcore.errors import FedcoreError
from fedcore.federation.state import (
    ServerState,
    latest_state,
    prune_clients,
    read_state,
    write_state,
)
from fedcore_kernels.layout import FactorLayout

LAYOUT = FactorLayout.build([("q", "A", 2, 5), ("q", "B", 2, 7)], [("head", (3,)), ("scale", ())])


def make(round=0, **changes):
    row = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(round))
    return ServerState(round=round, layout=LAYOUT, row=row, **changes)


@pytest.mark.parametrize("client", ["client-1", "site/a", "100%", "%2F", "/", "a b/c%d"])
def test_a_state_round_trips_to_the_bit(tmp_path, client):
    private = {client: {"q.A/exp_avg": torch.randn(2, 5), "q.A/step": torch.tensor(3.0)}}
    held = {client: {"held": torch.ones(4), "told:mean": torch.randn(3)}}
    state = make(3, simulated_clients=private, versions={"q.A": 2}, traffic={"up_head": 7})
    changed = LAYOUT.select("B")
    state = state.advanced(state.row, changed, reported=(client,), held_for_clients=held)
    back = read_state(write_state(state, tmp_path))
    assert back.layout == state.layout
    assert torch.equal(back.row, state.row)
    # One file holds what clients keep and what the server holds for them; names tell them apart.
    for part, expected in ((back.simulated_clients, private), (back.held_for_clients, held)):
        assert part.keys() == {client}
        assert part[client].keys() == expected[client].keys()
        for name, tensor in expected[client].items():
            assert torch.equal(part[client][name], tensor)
    assert (back.round, back.versions, back.client_versions, back.traffic) == (
        4,
        {"q.A": 2, "q.B": 3, "head": 3, "scale": 3},
        {client: 2},
        {"up_head": 7},
    )


def test_equal_states_give_equal_bytes(tmp_path):
    one = write_state(make(1), tmp_path / "a")
    other = write_state(make(1), tmp_path / "b")
    for name in ("server.safetensors", "state.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_half_written_states_are_not_seen(tmp_path):
    write_state(make(1), tmp_path)
    (tmp_path / ".round-0002.123.tmp").mkdir()
    (tmp_path / "round-0003").mkdir()
    assert latest_state(tmp_path) == tmp_path / "round-0001"
    assert latest_state(tmp_path / "nothing") is None


def test_damaged_states_are_refused(tmp_path):
    folder = write_state(make(1), tmp_path)
    weights = folder / "server.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3])
    with pytest.raises(FedcoreError, match="cannot read"):
        read_state(folder)
    weights.write_bytes(whole)
    (folder / "state.json").write_text('{"round": 1}')
    with pytest.raises(FedcoreError, match="cannot read the state"):
        read_state(folder)


def test_only_the_newest_states_keep_private_tensors(tmp_path):
    for round in range(4):
        write_state(make(round, simulated_clients={"c": {"x": torch.ones(1)}}), tmp_path)
    prune_clients(tmp_path, 2)
    kept = sorted(p.parent.name for p in tmp_path.glob("*/clients.safetensors"))
    assert kept == ["round-0002", "round-0003"]
    assert len(list(tmp_path.glob("*/server.safetensors"))) == 4


def test_a_client_downloads_what_changed_since_it_last_took_part():
    state = make(0)
    only_b = LAYOUT.select("B", dense=False)
    only_a = LAYOUT.select("A", dense=False)
    assert state.stale_for("x").numel == LAYOUT.numel
    state = state.advanced(state.row, only_b, reported=("x", "y"))  # round 0: x, y
    state = state.advanced(state.row, only_a, reported=("x",))  # round 1: x
    assert {s.name for s in state.stale_for("x")} == {"q.A"}
    assert {s.name for s in state.stale_for("y")} == {"q.A", "q.B"}
    assert state.stale_for("z").numel == LAYOUT.numel
