"""A recipe's sites through folders: the same federation as its simulation."""

import pytest
import torch

from fedcore.data.rows import tensors_from_row
from fedcore.errors import FedcoreError
from fedcore.experiments import holdings
from fedcore.experiments.run import start
from fedcore.federation.state import latest_state, read_state
from fedcore.training.site_settings import SiteSettings
from fedcore.transports.folder_sites import start_federation, train_site
from tests.experiments.site_jobs import site_recipe, write_site, write_sites

LABELS = ["film", "money", "sport"]
EVALUATED = {"evaluation.on": "sites", "evaluation.min_targets": 5}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("sites")
    write_sites(home / "sites")
    # The same rows as hospital-a's, under other names.
    write_site(home / "own notes a.jsonl", 100, 0, "note", "diagnosis")
    return home


def sites(home):
    columns = (("note", "text"), ("diagnosis", "label"))
    return (
        SiteSettings("hospital-a", str(home / "own notes a.jsonl"), columns=columns),
        SiteSettings("hospital-b", str(home / "sites" / "hospital-b.jsonl")),
    )


def deployed(home, task="classification", **settings):
    common = {"data.source": "sites", "round.expected": 2, **EVALUATED}
    if task == "classification":
        common["data.labels"] = LABELS
    return site_recipe(home, task, **{**common, **settings})


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("classification", {"method.name": "fedex"}),
        ("classification", {"method.name": "rolora"}),
        ("sft", {"round.weighting": "tokens", "adapter.dropout": 0.1}),
    ],
    ids=["residual", "alternating", "instruction tuning"],
)
def test_the_simulations_adapter_bit_for_bit(task, settings, home, tmp_path, monkeypatch):
    simulation = {"data.sites": str(home / "sites"), **EVALUATED, **settings}
    if task == "classification":
        simulation["data.labels"] = LABELS
    start(site_recipe(home, task, **simulation), tmp_path / "local")
    expected = read_state(latest_state(tmp_path / "local" / "state"))
    # Nothing is partitioned, and the server has no rows.
    monkeypatch.setattr(holdings, "partition", None)
    monkeypatch.setattr(holdings, "split_indices", None)
    recipe = deployed(home, task, **settings)
    server = start_federation(recipe, tmp_path / "federation")
    weights = []
    for round in range(2):
        uploads = tmp_path / f"uploads-{round}"
        for site in sites(home):
            train_site(recipe, site, server.broadcast, uploads / site.site)
        server = server.round(uploads)
        weights.append(dict(server.state.record["clients"]))
    ours, theirs = (tensors_from_row(state.row, state.layout) for state in (server.state, expected))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert set(server.state.residual) == set(expected.residual)
    if task == "classification":
        assert weights == [{"hospital-a": 80, "hospital-b": 32}] * 2


def test_a_broadcast_of_another_recipe_or_round_is_refused(home, tmp_path):
    recipe, (site, _) = deployed(home), sites(home)
    server = start_federation(recipe, tmp_path / "federation")
    other = deployed(home, **{"method.name": "rolora"})
    with pytest.raises(
        FedcoreError, match=r"the broadcast is of fedit with .*the recipe says rolora"
    ):
        train_site(other, site, server.broadcast, tmp_path / "upload")
    for round in range(2):
        uploads = tmp_path / f"uploads-{round}"
        train_site(recipe, site, server.broadcast, uploads / site.site)
        server = server.round(uploads)
    with pytest.raises(FedcoreError, match="is of round 2, and the recipe has 2"):
        train_site(recipe, site, server.broadcast, tmp_path / "upload")
    assert not (tmp_path / "upload").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimiser.state", "keep"),
        ("round.codec", "bf16"),
        ("privacy.noise_multiplier", 1.0),
        ("privacy.central.noise_multiplier", 1.0),
    ],
)
def test_what_folders_do_not_carry_is_refused_by_its_key(key, value, home, tmp_path):
    recipe = deployed(home, **{key: value})
    with pytest.raises(FedcoreError, match=f"^{key} is "):
        start_federation(recipe, tmp_path / "federation")
    with pytest.raises(FedcoreError, match=f"^{key} is "):
        train_site(recipe, sites(home)[0], tmp_path, tmp_path / "upload")


def test_a_recipe_of_partitioned_data_and_a_site_without_data_are_refused(home, tmp_path):
    with pytest.raises(FedcoreError, match=r"set data\.source = 'sites'"):
        start_federation(site_recipe(home, **{"data.sites": str(home / "sites")}), tmp_path / "f")
    with pytest.raises(FedcoreError, match="no data; set site and data"):
        train_site(deployed(home), SiteSettings(), tmp_path, tmp_path / "upload")
