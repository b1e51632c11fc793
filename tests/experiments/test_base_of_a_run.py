"""A run folder knows its base: another one is refused on resume, or flagged where it is allowed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification

from fedcore.data.base_identity import BaseIdentity
from fedcore.errors import FedcoreError
from fedcore.experiments.observer import Observer
from fedcore.experiments.run import resume, start
from fedcore.federation.state import latest_state, read_about
from tests.experiments.jobs import tiny_recipe


class Stop(Observer):
    def round_finished(self, record: Any) -> None:
        if record["round"] == 0:
            raise KeyboardInterrupt


@pytest.fixture
def interrupted(tmp_path: Path) -> Callable[..., Path]:
    """A run of the tiny model, after its first round; the model is the test's own."""

    def begin(**settings: Any) -> Path:
        recipe = tiny_recipe(tmp_path, **settings)
        with pytest.raises(KeyboardInterrupt):
            start(recipe, tmp_path / "run", Stop())
        return tmp_path / "run"

    return begin


def add_to_weights(folder: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.bias[3] += 1e-3
    model.save_pretrained(folder)


def add_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def change_config(folder: Path) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "layer_norm_eps": 0.1}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_to_weights, r"weights, first bert\.encoder\.layer\.0\.intermediate\.dense\.bias"),
        (add_template, "template, first chat_template"),
        (change_config, "config, first layer_norm_eps"),
    ],
)
def test_another_base_is_refused_and_the_first_difference_named(
    interrupted: Callable[..., Path], change: Callable[[Path], None], message: str
) -> None:
    run = interrupted()
    shutil.copytree(run.parent / "model", run.parent / "before")
    change(run.parent / "model")
    with pytest.raises(FedcoreError, match=f"cannot be resumed: .*the run's in its {message}"):
        resume(run)
    shutil.rmtree(run.parent / "model")
    (run.parent / "before").rename(run.parent / "model")
    assert resume(run)["finished"]


def test_what_may_differ_is_flagged_in_every_later_round(interrupted: Callable[..., Path]) -> None:
    run = interrupted(**{"model.allow": ["template"], "rounds": 3})
    add_template(run.parent / "model")
    resume(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    flag = "its base differs from the run's in its template, first chat_template, as allowed"
    assert [flag in line["flags"] for line in lines] == [False, False, True, True]


def test_the_file_is_there_from_the_start_and_has_to_stay(
    interrupted: Callable[..., Path],
) -> None:
    run = interrupted()
    identity = BaseIdentity.read(run)
    assert identity is not None
    assert set(identity.parts) == {"config", "quantisation", "weights", "tokenizer", "template"}
    # The head trains, so it is none of the base's.
    assert not any(name.startswith("classifier") for name in identity.tensors)
    text = (run / "base.json").read_text()
    (run / "base.json").unlink()
    with pytest.raises(FedcoreError, match=r"base\.json, which says what the base model was"):
        resume(run)
    (run / "base.json").write_text(text)
    assert resume(run)["finished"]
    newest = latest_state(run / "state")
    assert newest is not None
    assert "agreed" not in read_about(newest)


def test_the_whole_weights_are_read_where_the_recipe_says_so(
    interrupted: Callable[..., Path],
) -> None:
    identity = BaseIdentity.read(interrupted(**{"model.identity": "full"}))
    assert identity is not None
    assert identity.mode == "full"


@pytest.mark.parametrize("value", [["weight"], "all"])
def test_an_unknown_part_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(FedcoreError, match=r"recipe key model\.allow"):
        tiny_recipe(tmp_path, **{"model.allow": value})
