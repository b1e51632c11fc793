"""A recipe on Flower's simulation: real messages, clients in Ray's processes."""

import json
import sys

import pytest
import torch

from fedcore.errors import FedcoreError, MissingExtraError
from fedcore.experiments import run as local
from fedcore.federation.state import latest_state, read_state
from fedcore.transports.choice import find_engine
from tests.experiments.jobs import tiny_recipe
from tests.experiments.messages import Messages


@pytest.mark.slow
def test_ray_ends_with_the_local_engines_files(home, tmp_path):
    settings = {"method.name": "florg", "clients": 2, "engine": "flower", "training.threads": 2}
    engine, messages = find_engine("flower"), Messages()
    summary = engine.start(tiny_recipe(home, **settings), tmp_path / "flower", messages)
    # A process of Ray's that computed on one thread, as this one does, would be named.
    # A busy machine may say that it waits.
    assert not [text for text in messages.texts if not text.startswith("waiting for")]
    expected = local.start(tiny_recipe(home, **settings), tmp_path / "local")
    for name in ("accuracy", "bytes_up", "bytes_down", "best_client", "adapters", "finished"):
        assert summary[name] == expected[name], name
    ours, theirs = (
        read_state(latest_state(tmp_path / name / "state")) for name in ("flower", "local")
    )
    for name in ("flower", "local"):
        assert json.loads((tmp_path / name / "environment.json").read_text())["threads"] == 2
    assert torch.equal(ours.row, theirs.row)
    assert ours.traffic == theirs.traffic
    lines = [
        [
            {k: json.loads(line)[k] for k in ("round", "accuracy", "clients", "modules", "sampled")}
            for line in (tmp_path / name / "metrics.jsonl").open()
        ]
        for name in ("flower", "local")
    ]
    assert lines[0] == lines[1]
    for file in (tmp_path / "local").glob("adapter*/*.safetensors"):
        twin = tmp_path / "flower" / file.relative_to(tmp_path / "local")
        assert file.read_bytes() == twin.read_bytes()
    assert engine.resume(tmp_path / "flower") == json.loads(json.dumps(summary))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method.name": "local_only"},
            "local_only exchanges nothing .*, or take engine = 'local'",
        ),
        ({"method.name": "fedsa"}, "fedsa leaves each client a model of its own"),
        ({"round.secure_sum": True, "method.name": "fedit"}, "no round.secure_sum"),
        ({"round.codec": "int8"}, "no round.codec = 'int8'"),
        ({"privacy.noise_multiplier": 1.0}, "privacy needs engine = 'local'"),
        ({"privacy.central.noise_multiplier": 1.0}, "privacy needs engine = 'local'"),
    ],
)
def test_what_this_engine_cannot_do_is_said_before_anything_is_written(
    settings, message, home, tmp_path
):
    with pytest.raises(FedcoreError, match=message):
        find_engine("flower").start(tiny_recipe(home, **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_engine_is_said():
    with pytest.raises(FedcoreError, match="unknown engine 'flowers'; did you mean flower"):
        find_engine("flowers")


def test_without_flower_the_extra_is_named(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("fedcore.transports.flower")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fedcore-lora\[flower\]'"):
        find_engine("flower")
