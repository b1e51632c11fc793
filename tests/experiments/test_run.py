import json
import math

import pytest
import torch

from fedcore.data.peft_files import read_adapter, read_tensors
from fedcore.errors import FedcoreError
from fedcore.experiments.observer import Observer
from fedcore.experiments.round import sample_clients
from fedcore.experiments.run import resume, start
from fedcore.experiments.setup import build_experiment
from fedcore.federation.state import latest_state, read_state
from fedcore.methods import METHODS
from tests.experiments.jobs import tiny_recipe


class Stop(Observer):
    """Ends the run, as a signal would, in the middle of a round's training."""

    def __init__(self, after_steps: int) -> None:
        self.left = after_steps

    def step_done(self, loss: float) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def final_rows(folder):
    return read_state(latest_state(folder / "state"))


@pytest.mark.parametrize("method", [m.name for m in METHODS])
def test_every_method_runs_and_leaves_what_it_promises(method, home, tmp_path):
    # Krum with one faulty client needs five.
    recipe = tiny_recipe(home, **{"method.name": method, "clients": 5})
    summary = start(recipe, tmp_path / "run")
    assert summary["finished"]
    assert 0 <= summary["accuracy"] <= 1
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [record["round"] for record in records] == [-1, 0, 1]
    assert all(math.isfinite(record["train_loss"]) for record in records[1:])
    state = final_rows(tmp_path / "run")
    assert state.round == 2
    exchanged = method not in ("local_only", "centralised")
    assert (sum(summary["bytes_up"].values()) > 0) == exchanged
    for path in summary["adapters"]:
        assert list((tmp_path / "run" / path).glob("*.safetensors"))


def test_training_moves_the_global_model(home, tmp_path):
    recipe = tiny_recipe(home, rounds=1)
    start(recipe, tmp_path / "run")
    before = read_state(tmp_path / "run/state/round-0000")
    after = read_state(tmp_path / "run/state/round-0001")
    for slot in before.layout:
        was, now = before.layout.view(before.row, slot), after.layout.view(after.row, slot)
        assert not torch.equal(was, now), slot.name


@pytest.mark.parametrize(
    "settings",
    [
        {"method.name": "florg", "optimiser.state": "keep"},
        {"method.name": "rolora", "optimiser.state": "keep", "rounds": 3},
        {"method.name": "local_only"},
        {"method.name": "fedit", "round.participation": 0.5, "round.dropout": 0.3},
    ],
)
@pytest.mark.parametrize("steps", [0, 5, 13])
def test_an_interrupted_run_ends_with_the_same_bits(settings, steps, home, tmp_path):
    recipe = tiny_recipe(home, **settings)
    start(recipe, tmp_path / "whole")
    try:
        start(recipe, tmp_path / "cut", Stop(steps))
    except KeyboardInterrupt:
        assert not (tmp_path / "cut/summary.json").exists()
    resume(tmp_path / "cut")
    whole, cut = final_rows(tmp_path / "whole"), final_rows(tmp_path / "cut")
    assert torch.equal(whole.row, cut.row)
    assert whole.traffic == cut.traffic
    for client, tensors in whole.simulated_clients.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, cut.simulated_clients[client][name]), (client, name)
    for file in (tmp_path / "whole").glob("adapter*/**/*.safetensors"):
        twin = tmp_path / "cut" / file.relative_to(tmp_path / "whole")
        assert file.read_bytes() == twin.read_bytes()
    keep = ("round", "accuracy", "train_loss", "bytes_up", "bytes_down", "clients")
    lines = [
        [
            {k: json.loads(line)[k] for k in keep}
            for line in (tmp_path / run / "metrics.jsonl").open()
        ]
        for run in ("whole", "cut")
    ]
    assert lines[0] == lines[1]


def test_a_run_killed_between_state_and_metrics_loses_nothing(home, tmp_path):
    recipe = tiny_recipe(home)
    start(recipe, tmp_path / "run")
    metrics = tmp_path / "run/metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole.splitlines()[0] + '\n{"round": 0, "acc')
    (tmp_path / "run/summary.json").unlink()
    resume(tmp_path / "run")
    assert metrics.read_text() == whole


def test_a_finished_run_is_left_as_it_is(home, tmp_path):
    summary = start(tiny_recipe(home, rounds=1), tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert resume(tmp_path / "run") == json.loads(json.dumps(summary))
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_a_folder_that_holds_something_is_not_overwritten(home, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FedcoreError, match="is not empty"):
        start(tiny_recipe(home), tmp_path)
    with pytest.raises(FedcoreError, match="holds no run"):
        resume(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter.target_modules": ["qurey"]}, "target module 'qurey' is not in the model"),
        ({"adapter.layers": [7]}, "layer 7 does not exist; the model has 3 layers"),
        ({"partition.min_examples": 500}, "min_examples=500"),
        ({"data.label_column": "topic"}, "topic"),
        ({"training.device": "cuda:99"}, "training.device 'cuda:99' cannot be used"),
    ],
)
def test_what_does_not_fit_together_leaves_no_folder(settings, message, home, tmp_path):
    with pytest.raises(FedcoreError, match=message):
        start(tiny_recipe(home, **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_seed_decides_everything_and_the_global_generator_nothing(home, tmp_path):
    rows = []
    for i, (seed, noise) in enumerate([(0, 1), (0, 2), (1, 1)]):
        torch.manual_seed(noise)
        torch.rand(noise)
        start(tiny_recipe(home, seed=seed, rounds=1), tmp_path / str(i))
        rows.append(final_rows(tmp_path / str(i)).row)
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_the_cached_prefix_does_not_change_the_run(home, tmp_path):
    rows = []
    for reuse in (True, False):
        recipe = tiny_recipe(home, **{"adapter.layers": [-1], "training.reuse_prefix": reuse})
        experiment = build_experiment(recipe, Observer())
        assert experiment.forward.reuses_prefix is reuse
        start(recipe, tmp_path / str(reuse))
        rows.append(final_rows(tmp_path / str(reuse)).row)
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-5, atol=1e-5)


def test_every_client_draws_its_own_batches_in_every_round(home, tmp_path, monkeypatch):
    from fedcore.experiments import client_round as client_turn

    genuine, seeds = client_turn.train_client, []

    def recorded(*arguments, **named):
        seeds.append(named["seed"])
        return genuine(*arguments, **named)

    monkeypatch.setattr(client_turn, "train_client", recorded)
    start(tiny_recipe(home, rounds=3), tmp_path / "run")
    assert len(seeds) == len(set(seeds)) == 3 * 4


def test_pooled_training_steps_as_often_as_all_clients_together(home, tmp_path):
    class Steps(Observer):
        count = 0

        def step_done(self, loss: float) -> None:
            self.count += 1

    counts = []
    for method in ("centralised", "fedit"):
        steps = Steps()
        start(tiny_recipe(home, **{"method.name": method}), tmp_path / method, steps)
        counts.append(steps.count)
    assert counts == [2 * 4 * 2] * 2


@pytest.mark.parametrize(
    ("optimiser", "same"),
    [
        ({"optimiser.name": "sgd", "optimiser.rate": 0.5}, True),
        ({"optimiser.name": "sgd", "optimiser.rate": 0.2, "optimiser.momentum": 0.9}, True),
        ({"optimiser.name": "adamw", "optimiser.state": "keep"}, False),
    ],
)
def test_alignment_matters_only_to_optimisers_that_see_coordinates(optimiser, same, home, tmp_path):
    grams = []
    for align in (True, False):
        settings = {"adapter.init_std": 0.3, "method.align": align, "rounds": 3, **optimiser}
        start(tiny_recipe(home, **settings), tmp_path / str(align))
        state = final_rows(tmp_path / str(align))
        views = [state.layout.view(state.row, s).double() for s in state.layout.factor_slots]
        grams.append(torch.stack([view.T @ view for view in views]))
    gap = float((grams[0] - grams[1]).norm() / grams[0].norm())
    assert (gap < 1e-5) == same


def test_bf16_autocast_trains_fp32_adapters(home, tmp_path):
    summary = start(tiny_recipe(home, **{"training.autocast": True}), tmp_path / "run")
    start(tiny_recipe(home), tmp_path / "plain")
    assert summary["finished"]
    rows = [final_rows(tmp_path / name).row for name in ("run", "plain")]
    assert rows[0].dtype == torch.float32
    assert not torch.equal(*rows)
    torch.testing.assert_close(*rows, rtol=0.5, atol=0.05)


def test_who_takes_part_is_drawn_by_round(home):
    experiment = build_experiment(tiny_recipe(home, **{"round.participation": 0.5}), Observer())
    drawn = {sample_clients(experiment, t) for t in range(12)}
    assert all(len(set(sample)) == 2 for sample in drawn)
    assert len(drawn) > 1
    assert sample_clients(experiment, 3) == sample_clients(experiment, 3)


@pytest.mark.parametrize("method", ["florg", "rolora", "local_only"])
def test_the_order_in_which_clients_train_changes_nothing(method, home, tmp_path, monkeypatch):
    from fedcore.experiments import round as round_room

    recipe = tiny_recipe(home, **{"method.name": method, "optimiser.state": "keep"})
    start(recipe, tmp_path / "forward")
    drawn = round_room.sample_clients
    monkeypatch.setattr(round_room, "sample_clients", lambda *a: tuple(reversed(drawn(*a))))
    start(recipe, tmp_path / "backward")
    one, other = final_rows(tmp_path / "forward"), final_rows(tmp_path / "backward")
    assert torch.equal(one.row, other.row)
    for client, tensors in one.simulated_clients.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.simulated_clients[client][name])


def test_rounds_without_any_client_keep_the_state(home, tmp_path):
    recipe = tiny_recipe(home, **{"round.dropout": 0.99})
    start(recipe, tmp_path / "run")
    first = read_state(tmp_path / "run/state/round-0000")
    assert torch.equal(first.row, final_rows(tmp_path / "run").row)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert all(record["flags"] for record in records[1:])
    assert {d["reason"] for d in records[1]["dropped"]} == {"it did not report"}


def test_traffic_counts_what_travels(home, tmp_path):
    bytes_up, bytes_down = {}, {}
    for method in ("fedit", "ffa", "rolora", "florg", "head_only"):
        summary = start(tiny_recipe(home, **{"method.name": method}), tmp_path / method)
        bytes_up[method], bytes_down[method] = summary["bytes_up"], summary["bytes_down"]
    # 6 modules of 32 x 32 at rank 2, 4 clients, 2 rounds, 4 bytes a number.
    pair = 6 * 2 * (32 + 32) * 4 * 2 * 4
    head = (3 * 32 + 3) * 4 * 2 * 4
    assert bytes_up["fedit"] == {"adapter": pair, "head": head}
    assert bytes_down["fedit"] == {"adapter": pair, "head": head}
    assert bytes_up["ffa"] == bytes_up["rolora"] == bytes_up["florg"]
    assert bytes_up["florg"] == {"adapter": pair // 2, "head": head}
    assert bytes_up["head_only"] == {"adapter": 0, "head": head}
    # Round 0 brings both factors to every client, later rounds only what changed.
    assert bytes_down["ffa"]["adapter"] == bytes_down["rolora"]["adapter"] == pair * 3 // 4
    assert bytes_down["florg"]["adapter"] == pair // 2


def test_florg_starts_at_the_base_model(home):
    outputs = []
    for method in ("florg", "fedit", "head_only"):
        experiment = build_experiment(tiny_recipe(home, **{"method.name": method}), Observer())
        experiment.forward.eval()
        with torch.no_grad():
            outputs.append(experiment.forward(torch.arange(8)))
    torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[1], outputs[2], rtol=1e-5, atol=1e-5)


def test_the_final_adapter_is_the_final_state(home, tmp_path):
    start(tiny_recipe(home), tmp_path / "run")
    state = final_rows(tmp_path / "run")
    adapter = read_adapter(tmp_path / "run/adapter")
    assert adapter.family == "gram"
    assert torch.equal(adapter.to_row(state.layout), state.row)
    lora = read_tensors(tmp_path / "run/adapter-lora/adapter_model.safetensors", "test")
    assert {t.shape[0] for k, t in lora.items() if "lora_A" in k} == {4}


def test_a_poisoned_client_stops_the_run_by_name_or_is_dropped(home, tmp_path, monkeypatch):
    from fedcore.experiments import client_round as client_turn

    genuine = client_turn.train_client

    def poisoned(forward, examples, indices, parameters, *rest, **named):
        result = genuine(forward, examples, indices, parameters, *rest, **named)
        poisoned.calls += 1
        if poisoned.calls % 4 == 2:
            with torch.no_grad():
                next(iter(parameters.values()))[0] = math.nan
        return result

    poisoned.calls = 0
    monkeypatch.setattr(client_turn, "train_client", poisoned)
    with pytest.raises(
        FedcoreError, match=r"round 0: client client-01: .* not finite, such as nan"
    ):
        start(tiny_recipe(home), tmp_path / "raise")
    poisoned.calls = 0
    start(tiny_recipe(home, **{"round.on_invalid": "drop"}), tmp_path / "drop")
    records = [json.loads(line) for line in (tmp_path / "drop/metrics.jsonl").open()]
    assert [d["client"] for d in records[1]["dropped"]] == ["client-01"]
    assert bool(torch.isfinite(final_rows(tmp_path / "drop").row).all())


def test_identical_uploads_are_refused_by_methods_they_would_fool(home, tmp_path, monkeypatch):
    from fedcore.experiments import client_round as client_turn
    from fedcore.training.local_training import LocalResult

    def lazy(*arguments, **named):
        return LocalResult(0.0, 0, {})

    monkeypatch.setattr(client_turn, "train_client", lazy)
    with pytest.raises(FedcoreError, match="all 4 uploads are identical"):
        start(tiny_recipe(home), tmp_path / "a")
    start(tiny_recipe(home, **{"round.allow_identical_uploads": True}), tmp_path / "b")
    start(tiny_recipe(home, **{"method.name": "fedit"}), tmp_path / "c")


def test_a_client_that_changes_a_frozen_factor_is_refused(home, tmp_path, monkeypatch):
    from fedcore.experiments import client_round as client_turn
    from fedcore.training.binding import ModelBinding

    genuine = client_turn.train_client

    def cheating(forward, *rest, **named):
        result = genuine(forward, *rest, **named)
        with torch.no_grad():
            for name, parameter in cheating.binding.parameters.items():
                if name.endswith(".A"):
                    parameter.mul_(1.0 + 1e-6)
        return result

    of = ModelBinding.of

    def remember(model):
        cheating.binding = of(model)
        return cheating.binding

    monkeypatch.setattr(ModelBinding, "of", staticmethod(remember))
    monkeypatch.setattr(client_turn, "train_client", cheating)
    with pytest.raises(FedcoreError, match="client-00: a frozen factor or frame differs"):
        start(tiny_recipe(home, **{"method.name": "ffa"}), tmp_path / "a")
