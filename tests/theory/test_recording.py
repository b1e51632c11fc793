"""What is recorded of a run, and what is read of it."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fedcore.errors import FedcoreError
from fedcore.experiments.run import start
from fedcore_theory import recording
from fedcore_theory.checks.inexact import i02_divergence_of_a_run as i2
from tests.experiments.jobs import tiny_recipe


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


def test_the_driver_s_errors_are_those_of_the_run_itself(home, tmp_path):
    recipe = tiny_recipe(home, **{"method.name": "fedit"})
    found = recording.record_divergence(recipe, ["fedit", "flora_na", "product_svd", "fedex"])
    assert found.driver == "fedit"
    start(recipe, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rounds = [line for line in map(json.loads, lines) if line["round"] >= 0]
    for t, line in enumerate(rounds):
        assert [module["module"] for module in line["modules"]] == list(found.modules)
        expected = [module["aggregation_error"] for module in line["modules"]]
        assert found.errors["fedit"][t] == pytest.approx(expected, rel=1e-12)
    errors = {name: np.asarray(values) for name, values in found.errors.items()}
    assert all(values.shape == (len(rounds), len(found.modules)) for values in errors.values())
    assert (errors["product_svd"] < errors["flora_na"]).all()
    assert (errors["flora_na"] < errors["fedit"]).all()
    assert errors["fedex"].max() < 1e-6


def test_a_turned_upload_is_held_against_the_mean_of_the_raw_ones(home):
    recipe = tiny_recipe(home, **{"method.name": "fedit"})
    found = recording.record_divergence(recipe, ["fedrot", "fedit"])
    errors = {name: np.asarray(values) for name, values in found.errors.items()}
    assert not np.allclose(errors["fedrot"], errors["fedit"], rtol=1e-9)
    # Turning changes no product, so that the distance stays one between comparable matrices.
    assert errors["fedrot"].max() < 2


def test_methods_of_another_family_are_refused(home):
    recipe = tiny_recipe(home, **{"method.name": "fedit"})
    with pytest.raises(FedcoreError, match=r"florg\.avg_a aggregates adapters of family 'gram'"):
        recording.record_divergence(recipe, ["florg.avg_a"])


def test_what_comes_with_the_package_covers_every_panel():
    runs = recording.read_record("bbc-news-fast")
    assert {run.driver: tuple(run.errors) for run in runs} == dict(recording.PANELS)
    with pytest.raises(FedcoreError, match="no run of 'bbc-news' is recorded"):
        recording.read_record("bbc-news")


@pytest.mark.parametrize(
    ("driver", "one", "other"),
    [
        ("fedit", "fedit", "flora_na"),
        ("fedit", "product_svd", "fedrot"),
        ("fedit", "fedex", "fedit"),
        ("florg.truncated", "florg.truncated", "florg.avg_a"),
    ],
)
def test_i2_notices_results_under_another_s_name(driver, one, other):
    runs = list(i2.draw(0))
    for n, run in enumerate(runs):
        if run.driver == driver:
            errors = {**run.errors, one: run.errors[other], other: run.errors[one]}
            runs[n] = replace(run, errors=errors)
    assert not i2.CHECK.measure([tuple(runs)]).holds
