"""One of three SuperNodes replies a fault in every round: the federation is that of the others."""

import importlib.util
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import tomli_w
import torch

from fedcore.federation.server_round import OpenRound
from fedcore.federation.state import read_state
from fedcore.methods import create_method
from fedcore.transports.flower.messages import KeyMap
from tests.transports.flower.deployment import Deployment
from tests.transports.flower.test_deployment import wait_for

SOURCE = Path(__file__).parent / "apps" / "malicious_app.py"


def loaded():
    spec = importlib.util.spec_from_file_location("malicious_app", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(folder: Path, states: Path, faults: list[int]) -> Path:
    parts = {"serverapp": "malicious_app:server", "clientapp": "malicious_app:client"}
    project = {"name": "malicious", "version": "1.0.0", "license": {"file": "LICENSE"}}
    job = {
        "publisher": "nobody",
        "fab-format-version": 1,
        "flwr-version-target": version("flwr"),
        "components": parts,
        "config": {"states": str(states), "faults": ",".join(map(str, faults))},
    }
    project["dependencies"] = [f"flwr>={version('flwr')}"]
    folder.mkdir()
    shutil.copy(SOURCE, folder / SOURCE.name)
    (folder / "LICENSE").write_text("None.\n")
    about = {"project": project, "tool": {"flwr": {"app": job}}}
    (folder / "pyproject.toml").write_text(tomli_w.dumps(about))
    return folder


EVERY = list(range(len(loaded().FAULTS)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults", [EVERY[::4], pytest.param(EVERY, marks=pytest.mark.exhaustive)], ids=["few", "all"]
)
def test_every_round_is_that_of_the_honest_two(tmp_path, faults):
    app, states = loaded(), tmp_path / "states"
    folder = written(tmp_path / "app", states, faults)
    last = states / f"round-{len(faults):04d}" / "state.json"
    with Deployment(tmp_path, nodes=3) as deployment:
        process = deployment.spawn("run", f"flwr run {folder} loopback --stream")
        wait_for(last, process, deployment, seconds=480)
    key_map, _ = KeyMap.of(app.drawn(0))
    method, names = create_method("product_svd"), set()
    for t in range(len(faults)):
        before, after = (read_state(states / f"round-{n:04d}", clients=False) for n in (t, t + 1))
        tensors = key_map.pack(before.row, before.layout)
        honest = sorted(after.record["clients"].items(), key=lambda item: item[1])
        assert [weight for _, weight in honest] == [1.0, 2.0]
        opened = OpenRound(method, before, [name for name, _ in honest])
        for partition, (name, _) in enumerate(honest):
            row = key_map.unpack(app.trained(partition, t, tensors), opened.layout)
            opened.receive(name, row, partition + 1.0)
        assert torch.equal(after.row, opened.close().state.row), t
        (drop,) = after.record["dropped"]
        names.add(drop["client"])
        assert drop["reason"]
        assert "\x1b" not in json.dumps(after.record)
    assert len(names) == 1
