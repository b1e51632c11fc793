"""The real thing on one machine: a SuperLink and two SuperNodes, and later one of them killed."""

import json
from time import monotonic, sleep

import pytest
import torch

from fedcore.experiments import run as local
from fedcore.federation.state import latest_state, read_state
from fedcore.transports.flower.apps import write_app
from tests.experiments.jobs import tiny_recipe
from tests.transports.flower.deployment import Deployment


def wait_for(path, process, deployment, seconds=240):
    end = monotonic() + seconds
    while not path.exists():
        assert process.poll() is None or path.exists(), deployment.log("run")
        assert monotonic() < end, {n: deployment.log(n) for n in (*deployment.processes,)}
        sleep(0.1)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_deployment_ends_with_the_local_engines_adapter_and_survives_a_dead_node(home, tmp_path):
    settings = {"clients": 2, "rounds": 2}
    recipe = tiny_recipe(home, **{"method.name": "florg", **settings})
    local.start(recipe, tmp_path / "local")
    out, later = tmp_path / "run", tmp_path / "later"
    app = write_app(recipe, tmp_path / "app", out=out, timeout=120.0)
    second = tiny_recipe(home, **{"method.name": "fedit", **settings})
    second_app = write_app(second, tmp_path / "second", out=later, timeout=60.0)
    with Deployment(tmp_path, nodes=2) as deployment:
        process = deployment.spawn("run", f"flwr run {app} loopback --stream")
        wait_for(out / "summary.json", process, deployment)
        process = deployment.spawn("run", f"flwr run {second_app} loopback --stream")
        wait_for(later / "state" / "round-0001" / "state.json", process, deployment)
        deployment.kill("supernode-1")
        wait_for(later / "summary.json", process, deployment)

    ours, theirs = (read_state(latest_state(f / "state")) for f in (out, tmp_path / "local"))
    assert ours.round == 2
    assert torch.equal(ours.row, theirs.row)
    for file in (tmp_path / "local").glob("adapter*/*.safetensors"):
        assert file.read_bytes() == (out / file.relative_to(tmp_path / "local")).read_bytes()

    assert read_state(latest_state(later / "state")).round == 2
    records = [json.loads(line) for line in (later / "metrics.jsonl").open()]
    assert [record["dropped"] for record in records[:2]] == [[], []]
    assert [d["client"] for d in records[2]["dropped"]] == ["client-01"]
    assert json.loads((later / "summary.json").read_text())["finished"]
