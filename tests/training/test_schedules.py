"""Learning rates over all rounds: the curve, where a round enters it, and what a recipe may say."""

import math

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from fedcore.errors import FedcoreError
from fedcore.experiments import client_round
from fedcore.experiments.observer import Observer
from fedcore.experiments.run import start
from fedcore.experiments.setup import build_experiment
from fedcore.recipes import load_recipe
from fedcore.training.local_training import LocalSettings, train_client
from fedcore.training.optimisers import OptimiserSettings
from fedcore.training.private_training import PrivateSettings, train_privately
from fedcore.training.schedules import OPTIONS, Schedule, enter_schedule
from tests.experiments.jobs import tiny_recipe
from tests.training.test_local_training import EVERYTHING, EXAMPLES, TinyForward, parameters

RATE, ROUNDS, STEPS = 0.02, 4, 5

# One of each name, with what it needs.
SCHEDULES = {
    "constant": Schedule(),
    "constant_with_warmup": Schedule("constant_with_warmup", 1.5),
    "linear": Schedule("linear", 0.4),
    "cosine": Schedule("cosine", 0.4, {"num_cycles": 0.75}),
    "cosine_with_restarts": Schedule("cosine_with_restarts", 0.4, {"num_cycles": 2}),
    "cosine_with_min_lr": Schedule("cosine_with_min_lr", 0.4, {"min_lr": 0.005}),
    "cosine_warmup_with_min_lr": Schedule("cosine_warmup_with_min_lr", 1, {"min_lr_rate": 0.1}),
    "polynomial": Schedule("polynomial", 0.4, {"lr_end": 0.001, "power": 2}),
    "warmup_stable_decay": Schedule("warmup_stable_decay", 1, {"decay_rounds": 2}),
}
# The arguments of transformers where they have another name.
OTHERWISE = {"warmup_stable_decay": {"num_decay_steps": 2 * STEPS}}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def rates(schedule, rounds=ROUNDS, steps=STEPS, rate=RATE, head=None):
    """The rates of every step, each round entered anew, as clients do."""
    seen = []
    for t in range(rounds):
        weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
        groups = [
            {"params": [w], "lr": lr} for w, lr in zip(weights, (rate, head or rate), strict=True)
        ]
        optimiser = torch.optim.SGD(groups)
        scheduler = enter_schedule(
            optimiser, schedule, rate=rate, round=t, rounds=rounds, steps=steps
        )
        for _ in range(steps):
            seen.append(tuple(group["lr"] for group in optimiser.param_groups))
            optimiser.step()
            scheduler.step()
    return seen


def test_every_schedule_has_a_case():
    assert SCHEDULES.keys() == OPTIONS.keys()


@pytest.mark.parametrize("name", SCHEDULES)
def test_rounds_are_pieces_of_one_curve(name):
    """Against transformers' schedule of one training of all steps."""
    schedule = SCHEDULES[name]
    optimiser = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=RATE)
    whole = get_scheduler(
        name,
        optimiser,
        num_warmup_steps=int(schedule.warmup_rounds * STEPS),
        num_training_steps=ROUNDS * STEPS,
        scheduler_specific_kwargs=OTHERWISE.get(name, dict(schedule.options)),
    )
    expected = []
    for _ in range(ROUNDS * STEPS):
        expected.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        whole.step()
    assert [rate for rate, _ in rates(schedule)] == expected
    assert len(set(expected)) > 1 or name == "constant"


def test_a_cosine_goes_down_through_all_rounds_and_ends_near_zero():
    seen = [rate for rate, _ in rates(Schedule("cosine"), rounds=3, steps=3)]
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == RATE
    expected = [RATE * 0.5 * (1 + math.cos(math.pi * i / 9)) for i in range(9)]
    assert seen == pytest.approx(expected, rel=1e-12)


def test_a_client_of_more_steps_follows_the_same_curve():
    few, many = (rates(Schedule("linear"), steps=steps) for steps in (2, 8))
    assert [rate for rate, _ in few] == pytest.approx([rate for rate, _ in many[::4]])


def test_the_heads_rate_keeps_its_ratio_and_floors_are_of_the_adapters_rate():
    schedule = Schedule("cosine_with_min_lr", options={"min_lr": RATE / 10})
    seen = rates(schedule, steps=200, head=RATE / 2)
    assert all(head == pytest.approx(rate / 2) for rate, head in seen)
    assert seen[-1][0] == pytest.approx(RATE / 10, rel=1e-3)


def test_polynomials_end_at_zero_unless_set():
    seen = rates(Schedule("polynomial"), rate=1e-8)
    assert seen[-1][0] == pytest.approx(1e-8 / (ROUNDS * STEPS))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_constant_schedule_leaves_the_bits_of_a_loop_without_one(name):
    settings = OptimiserSettings(name=name, rate=0.0123, momentum=0.9)
    forward, twin = TinyForward(), TinyForward()
    local = LocalSettings(batch_size=20, steps=5, clip_norm=None)
    train_client(
        forward,
        EXAMPLES,
        EVERYTHING,
        parameters(forward),
        frozenset(),
        local,
        settings,
        seed=3,
        round=2,
        rounds=7,
    )
    ordered = [twin.layer.bias, twin.layer.weight]
    optimiser: torch.optim.Optimizer = torch.optim.AdamW(ordered, lr=0.0123, weight_decay=0.0)
    if name == "sgd":
        optimiser = torch.optim.SGD(ordered, lr=0.0123, momentum=0.9)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        batch = EVERYTHING[torch.randperm(20, generator=generator)]
        optimiser.zero_grad()
        nn.functional.cross_entropy(twin(batch), EXAMPLES.labels[batch]).backward()
        optimiser.step()
    assert torch.equal(forward.layer.weight, twin.layer.weight)
    assert torch.equal(forward.layer.bias, twin.layer.bias)


def private(forward, settings, **place):
    return train_privately(
        forward.layer,
        forward,
        EXAMPLES,
        EVERYTHING,
        parameters(forward),
        frozenset(),
        LocalSettings(batch_size=20, steps=1),
        settings,
        PrivateSettings(1e-9, 1e9),
        seed=0,
        **place,
    )


def plain(forward, settings, **place):
    local = LocalSettings(batch_size=20, steps=1, clip_norm=None)
    args = (EXAMPLES, EVERYTHING, parameters(forward), frozenset(), local, settings)
    return train_client(forward, *args, seed=0, **place)


@pytest.mark.parametrize("train", [plain, private])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_both_loops_step_at_the_rate_of_their_round(train):
    """SGD's step is the rate times the gradient, which is that of round 0."""
    settings = OptimiserSettings(name="sgd", rate=0.1, schedule=Schedule("linear"))
    moved = []
    for t in range(4):
        forward = TinyForward()
        before = forward.layer.weight.detach().clone()
        train(forward, settings, round=t, rounds=4)
        moved.append(float((forward.layer.weight.detach() - before).norm()))
    assert [m / moved[0] for m in moved] == pytest.approx([1, 0.75, 0.5, 0.25], rel=1e-4)


def test_a_client_without_examples_enters_nothing():
    settings = OptimiserSettings(schedule=Schedule("polynomial"))
    forward = TinyForward()
    args = (EXAMPLES, EVERYTHING[:0], parameters(forward), frozenset(), LocalSettings(), settings)
    assert train_client(forward, *args, seed=0, round=1, rounds=3).steps == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosinus"}, "schedule"),
        ({"schedule": "reduce_lr_on_plateau"}, "schedule"),
        ({"warmup_rounds": 1}, "'constant_with_warmup'"),
        ({"warmup_rounds": -1, "schedule": "cosine"}, "warmup_rounds"),
        ({"schedule_options": {"num_cycles": 1}}, "'constant' takes no schedule_options"),
        ({"schedule": "cosine", "schedule_options": {"cycles": 1}}, "did you mean num_cycles"),
        ({"schedule": "cosine", "schedule_options": {"num_cycles": 0}}, "num_cycles is 0"),
        ({"schedule": "cosine_with_min_lr"}, "needs schedule_options.min_lr"),
        (
            {
                "schedule": "cosine_with_min_lr",
                "schedule_options": {"min_lr": 0, "min_lr_rate": 0},
            },
            "not both",
        ),
        ({"schedule": "warmup_stable_decay"}, "needs schedule_options.decay_rounds"),
        (
            {
                "schedule": "warmup_stable_decay",
                "schedule_options": {"decay_rounds": 1, "decay_type": "steep"},
            },
            "decay_type",
        ),
    ],
)
def test_a_recipe_with_a_wrong_schedule_is_refused(settings, message):
    with pytest.raises(FedcoreError, match=message):
        load_recipe("bbc-news", {f"optimiser.{key}": value for key, value in settings.items()})


def test_a_run_tells_its_clients_which_round_of_how_many_it_is(home, tmp_path, monkeypatch):
    genuine, seen = client_round.train_client, []

    def recorded(*args, **named):
        seen.append((named["round"], named["rounds"], args[6].schedule))
        return genuine(*args, **named)

    monkeypatch.setattr(client_round, "train_client", recorded)
    chosen = {"optimiser.schedule": "cosine", "optimiser.warmup_rounds": 0.5}
    start(tiny_recipe(home, rounds=3, clients=2, **chosen), tmp_path / "run")
    assert seen == [(t, 3, Schedule("cosine", 0.5)) for t in (0, 0, 1, 1, 2, 2)]


def test_a_run_with_a_schedule_that_does_not_fit_it_does_not_begin(home):
    chosen = {"optimiser.schedule": "cosine", "optimiser.warmup_rounds": 3}
    with pytest.raises(FedcoreError, match="warmup_rounds is 3 of 2 rounds"):
        build_experiment(tiny_recipe(home, **chosen), Observer())


def test_a_recipe_states_its_schedule():
    chosen = {
        "optimiser.schedule": "cosine_with_restarts",
        "optimiser.warmup_rounds": 0.5,
        "optimiser.schedule_options": {"num_cycles": 2},
    }
    recipe = load_recipe("bbc-news", chosen)
    expected = Schedule("cosine_with_restarts", 0.5, {"num_cycles": 2})
    assert recipe.optimiser.settings(recipe.method.create()).schedule == expected


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Schedule("linear", 3), "warmup_rounds is 3 of 3 rounds"),
        (Schedule("warmup_stable_decay", 1, {"decay_rounds": 2.5}), "more than the 3 rounds"),
        (Schedule("cosine_with_min_lr", options={"min_lr": 0.2}), r"min_lr is 0\.2, and .* 0\.1"),
        (Schedule("polynomial", options={"lr_end": 0.1}), r"lr_end is 0\.1"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(schedule, message):
    with pytest.raises(FedcoreError, match=message):
        schedule.check(0.1, 3)


def test_a_round_beyond_the_last_is_refused():
    optimiser = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(FedcoreError, match="round is 3"):
        enter_schedule(optimiser, Schedule("linear"), rate=1.0, round=3, rounds=3, steps=1)
