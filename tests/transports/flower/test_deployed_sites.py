"""The real thing on one machine: a SuperLink, and SuperNodes of two sites with their own files."""

import json

import pytest
import torch

from fedcore.experiments import run as local
from fedcore.federation.state import latest_state, read_state
from fedcore.transports.flower.apps import write_app
from tests.experiments.site_jobs import site_recipe, write_site, write_sites
from tests.transports.flower.deployment import Deployment
from tests.transports.flower.test_deployment import wait_for


@pytest.mark.exhaustive
def test_two_of_three_expected_sites_train_and_evaluate_on_their_own_rows(tmp_path):
    write_sites(tmp_path / "sites")
    own = write_site(tmp_path / "own notes a.jsonl", 100, 0, "note", "diagnosis")
    labels = {"data.labels": ["film", "money", "sport"]}
    evaluation = {"evaluation.on": "sites", "evaluation.min_targets": 5, "rounds": 1}
    simulation = {"data.sites": str(tmp_path / "sites"), **labels, **evaluation}
    local.start(site_recipe(tmp_path, **simulation), tmp_path / "local")
    rounds = {"round.expected": 3, "round.quorum": 2, "round.patience": 5.0}
    settings = {"data.source": "sites", **labels, **evaluation, **rounds}
    out = tmp_path / "run"
    recipe = site_recipe(tmp_path, **settings)
    app = write_app(recipe, tmp_path / "app", out=out, timeout=240.0)
    configs = (
        f'site="hospital-a" data="{own}" columns="note:text,diagnosis:label" device="cpu"',
        f'site="hospital-b" data="{tmp_path}/sites/hospital-b.jsonl" batch-size=8',
    )
    with Deployment(tmp_path, nodes=2, configs=configs) as deployment:
        process = deployment.spawn("run", f"flwr run {app} loopback --stream")
        wait_for(out / "summary.json", process, deployment, seconds=540)
        said = deployment.log("run") + deployment.log("superlink")

    assert json.loads((out / "summary.json").read_text())["finished"]
    records = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [record["sampled"] for record in records[1:]] == [["hospital-a", "hospital-b"]]
    for record in records[1:]:
        examples = {c["client"]: c["examples"] for c in record["clients"]}
        assert examples == {"hospital-a": 80, "hospital-b": 32}
        assert record["sites"]["examples"] == 20 + 8
        assert record["dropped"] == []
    # What the server has of the data is who sent how much.
    assert json.loads((out / "partition.json").read_text())["client_ids"] == []
    assert "own notes" not in said
    assert "diagnosis" not in said
    ours, theirs = (read_state(latest_state(f / "state")) for f in (out, tmp_path / "local"))
    assert torch.equal(ours.row, theirs.row)
