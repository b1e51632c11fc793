"""How uploads travel: number formats, and sums that hide their terms."""

import json
import math

import pytest
import torch

from fedcore.errors import FedcoreError
from fedcore.experiments.run import start
from fedcore.federation.state import latest_state, read_state
from tests.experiments.jobs import tiny_recipe


def records_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def final_row(run):
    return read_state(latest_state(run / "state")).row


def test_a_codec_decides_bytes_and_error_and_hardly_the_model(home, tmp_path):
    summaries, errors = {}, {}
    for codec in ("fp32", "bf16", "int8"):
        recipe = tiny_recipe(home, **{"method.name": "fedit", "round.codec": codec})
        summaries[codec] = start(recipe, tmp_path / codec)
        errors[codec] = records_of(tmp_path / codec)[1]["upload_error"]
    assert errors["fp32"] == 0
    assert 2**-11 < errors["bf16"] < 2**-8
    assert 2**-11 < errors["int8"] < 2**-6
    up = {codec: summary["bytes_up"]["adapter"] for codec, summary in summaries.items()}
    assert up["bf16"] * 2 == up["fp32"]
    # Tensors of 64 numbers: a byte each and one fp32 scale.
    assert up["int8"] * 4 == up["fp32"] * 68 // 64
    assert len({summary["bytes_down"]["adapter"] for summary in summaries.values()}) == 1
    exact = final_row(tmp_path / "fp32")
    for codec in ("bf16", "int8"):
        gap = (final_row(tmp_path / codec) - exact).norm() / exact.norm()
        assert 0 < gap < 0.05


def test_a_value_that_no_format_carries_is_still_refused_by_name(home, tmp_path, monkeypatch):
    from fedcore.experiments import client_round as client_turn

    genuine = client_turn.train_client

    def poisoned(forward, examples, indices, parameters, *rest, **named):
        result = genuine(forward, examples, indices, parameters, *rest, **named)
        with torch.no_grad():
            next(iter(parameters.values()))[0] = math.inf
        return result

    monkeypatch.setattr(client_turn, "train_client", poisoned)
    recipe = tiny_recipe(home, **{"method.name": "fedit", "round.codec": "int8"})
    with pytest.raises(FedcoreError, match=r"client client-00: .* not finite, such as inf"):
        start(recipe, tmp_path / "run")


@pytest.mark.parametrize("method", ["rolora", "florg.whitened", "fed_sb"])
def test_methods_that_claim_it_run_behind_a_sum(method, home, tmp_path):
    settings = {"method.name": method, "rounds": 1}
    plain = start(tiny_recipe(home, **settings), tmp_path / "plain")
    masked = start(tiny_recipe(home, **settings, **{"round.secure_sum": True}), tmp_path / "sum")
    # One step of the grid is 3.8e-6; Gram factors are no smaller than 1e-2.
    torch.testing.assert_close(
        final_row(tmp_path / "sum"), final_row(tmp_path / "plain"), rtol=1e-3, atol=2e-5
    )
    # Eight bytes a number in place of four, and no number less.
    assert masked["bytes_up"]["head"] == 2 * plain["bytes_up"]["head"]


@pytest.mark.parametrize("method", ["product_svd", "local_only"])
def test_methods_that_need_every_upload_refuse_a_sum(method, home, tmp_path):
    recipe = tiny_recipe(home, **{"method.name": method, "round.secure_sum": True})
    with pytest.raises(FedcoreError, match=r"round.secure_sum: .*; use one of fedit, "):
        start(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_server_sees_masked_uploads_and_one_mean(home, tmp_path, monkeypatch):
    from fedcore.methods.lora.fedit import FedIT
    from fedcore.privacy import SecureSum

    seen = []
    genuine = SecureSum.add

    def watched(self, client, masked):
        seen.append(masked)
        genuine(self, client, masked)

    def forbidden(self, cohort, previous):
        raise AssertionError("the uploads were shown to the server half")

    monkeypatch.setattr(SecureSum, "add", watched)
    monkeypatch.setattr(FedIT, "aggregate", forbidden)
    recipe = tiny_recipe(home, **{"method.name": "fedit", "round.secure_sum": True})
    start(recipe, tmp_path / "run")
    assert len(seen) == 8
    # Uniform 64-bit numbers: about half of them are negative, none is a small fixed-point number.
    for masked in seen:
        assert abs(float((masked < 0).double().mean()) - 0.5) < 0.1
        assert float(masked.abs().double().median()) > 2**60


def test_a_dropped_client_is_no_part_of_the_sum(home, tmp_path):
    settings = {"method.name": "fedit", "rounds": 1, "round.dropout": 0.4, "seed": 4}
    start(tiny_recipe(home, **settings), tmp_path / "plain")
    start(tiny_recipe(home, **settings, **{"round.secure_sum": True}), tmp_path / "sum")
    dropped = records_of(tmp_path / "sum")[1]["dropped"]
    assert len(dropped) == 1
    torch.testing.assert_close(
        final_row(tmp_path / "sum"), final_row(tmp_path / "plain"), rtol=1e-4, atol=2e-5
    )


def test_masked_integers_have_one_number_format(home):
    with pytest.raises(FedcoreError, match="leave it at 'fp32'"):
        tiny_recipe(home, **{"round.secure_sum": True, "round.codec": "bf16"})


@pytest.mark.parametrize("method", ["fedit", "florg.whitened"])
def test_a_round_of_too_few_clients_is_skipped_and_flagged(method, home, tmp_path):
    settings = {"method.name": method, "rounds": 3, "round.secure_sum": True, "seed": 4}
    settings |= {"round.dropout": 0.55, "round.min_cohort": 3, "optimiser.state": "keep"}
    start(tiny_recipe(home, **settings), tmp_path / "run")
    records = records_of(tmp_path / "run")[1:]
    rows = [read_state(tmp_path / f"run/state/round-000{t}", clients=False).row for t in range(4)]
    kinds = set()
    for record, before, after in zip(records, rows[:-1], rows[1:], strict=True):
        silent = sum(d["reason"] == "it did not report" for d in record["dropped"])
        reported = 4 - silent
        skipped = reported < 3
        kinds.add(skipped)
        assert torch.equal(before, after) == skipped
        if skipped and reported:
            assert record["flags"][0] == (
                f"{reported} of 4 clients can be used, fewer than min_cohort = 3: the round keeps "
                "the global state"
            )
            assert len(record["dropped"]) == 4
            assert record["modules"] == []
    assert kinds == {True, False}


def test_a_sum_that_could_never_be_of_enough_clients_is_refused(home):
    for settings in ({"clients": 1}, {"round.participation": 0.25}, {"round.min_cohort": 5}):
        with pytest.raises(
            FedcoreError, match=r"round.min_cohort is \d, and a round asks \d of \d"
        ):
            tiny_recipe(home, **{"round.secure_sum": True, **settings})
    with pytest.raises(FedcoreError, match=r"round\.min_cohort"):
        tiny_recipe(home, **{"round.min_cohort": 1})
    tiny_recipe(home, **{"clients": 1, "round.min_cohort": 5})
