import math

import peft
import pytest
import torch
from torch import nn

from fedcore.data.validation import digest
from fedcore.errors import FedcoreError
from fedcore.training.binding import ModelBinding
from fedcore.training.encoding import EncodedDataset
from fedcore.training.evaluation import evaluate
from fedcore.training.live_adapter import live_adapter
from fedcore.training.local_training import LocalSettings, train_client
from fedcore.training.optimisers import OptimiserSettings, build_optimiser, optimiser_state


class TinyForward:
    """A linear classifier on three tokens, with the interface of the real forward."""

    def __init__(self, dropout: float = 0.0) -> None:
        self.layer = nn.Linear(3, 2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(6.0).reshape(2, 3) / 10)
            self.layer.bias.zero_()
        self.dropout = nn.Dropout(dropout)

    def __call__(self, batch):
        return self.layer(self.dropout(EXAMPLES.input_ids[batch].float()))

    def train(self):
        self.dropout.train()

    def eval(self):
        self.dropout.eval()

    def random_devices(self):
        return []


GENERATOR = torch.Generator().manual_seed(0)
EXAMPLES = EncodedDataset(
    torch.randint(0, 5, (20, 3), generator=GENERATOR),
    torch.ones(20, 3, dtype=torch.int64),
    torch.randint(0, 2, (20,), generator=GENERATOR),
)
EVERYTHING = torch.arange(20)


def parameters(forward):
    return {"weight": forward.layer.weight, "bias": forward.layer.bias}


def train(forward, local=None, optimiser=None, **named):
    return train_client(
        forward,
        EXAMPLES,
        named.pop("indices", EVERYTHING),
        named.pop("parameters", parameters(forward)),
        frozenset({"bias"}),
        local or LocalSettings(batch_size=4, steps=3, clip_norm=None),
        optimiser or OptimiserSettings(name="sgd", rate=0.1),
        seed=named.pop("seed", 0),
        **named,
    )


def test_sgd_steps_are_those_done_by_hand():
    forward, twin = TinyForward(), TinyForward()
    train(
        forward,
        LocalSettings(batch_size=20, steps=2, clip_norm=None),
        OptimiserSettings(name="sgd", rate=0.1, head_rate=0.5),
    )
    for _ in range(2):
        loss = nn.functional.cross_entropy(twin(EVERYTHING), EXAMPLES.labels)
        grads = torch.autograd.grad(loss, [twin.layer.weight, twin.layer.bias])
        with torch.no_grad():
            twin.layer.weight -= 0.1 * grads[0]
            twin.layer.bias -= 0.5 * grads[1]
    torch.testing.assert_close(forward.layer.weight, twin.layer.weight)
    torch.testing.assert_close(forward.layer.bias, twin.layer.bias)


def test_the_gradient_norm_is_bounded():
    forward = TinyForward()
    before = [p.detach().clone() for p in parameters(forward).values()]
    train(forward, LocalSettings(batch_size=20, steps=1, clip_norm=1e-3))
    moved = [p - b for p, b in zip(parameters(forward).values(), before, strict=True)]
    total = math.sqrt(sum(float(m.detach().square().sum()) for m in moved))
    assert total == pytest.approx(0.1 * 1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "examples", "steps"),
    [
        (LocalSettings(batch_size=4, epochs=2), 20, 10),
        (LocalSettings(batch_size=8, epochs=1), 20, 3),
        (LocalSettings(batch_size=8, steps=7), 3, 7),
        (LocalSettings(batch_size=8, steps=7), 0, 0),
    ],
)
def test_steps_and_epochs_count_as_they_say(settings, examples, steps):
    losses = []
    result = train(TinyForward(), settings, indices=EVERYTHING[:examples], on_step=losses.append)
    assert result.steps == len(losses) == steps
    assert math.isnan(result.loss) == (steps == 0)
    if steps:
        assert result.loss == pytest.approx(sum(losses) / steps, rel=1e-6)


def test_training_is_decided_by_its_seed_and_leaves_the_global_generator_alone():
    results = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        forward = TinyForward(dropout=0.5)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        train(forward, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        results.append(forward.layer.weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_kept_state_continues_where_the_client_stopped(name):
    settings = OptimiserSettings(name=name, rate=0.05, momentum=0.9, state="keep")
    one, two = TinyForward(), TinyForward()
    whole = LocalSettings(batch_size=20, steps=4, clip_norm=None)
    half = LocalSettings(batch_size=20, steps=2, clip_norm=None)
    train(one, whole, settings)
    state = train(two, half, settings).state
    train(two, half, settings, state=state)
    torch.testing.assert_close(one.layer.weight, two.layer.weight, rtol=1e-6, atol=1e-7)
    fresh = TinyForward()
    train(fresh, half, settings)
    train(fresh, half, settings)
    assert not torch.allclose(one.layer.weight, fresh.layer.weight, atol=1e-4)


def test_reset_state_is_neither_used_nor_returned():
    settings = OptimiserSettings(rate=0.05, state="reset")
    one, two = TinyForward(), TinyForward()
    kept = train(TinyForward(), None, OptimiserSettings(rate=0.05, state="keep")).state
    assert train(one, None, settings, state=kept).state == {}
    train(two, None, settings)
    assert torch.equal(one.layer.weight, two.layer.weight)


def test_what_does_not_train_keeps_its_moments():
    settings = OptimiserSettings(rate=0.05, state="keep")
    forward = TinyForward()
    first = train(forward, None, settings).state
    only = {"weight": forward.layer.weight}
    second = train(forward, None, settings, parameters=only, state=first).state
    assert set(second) == set(first)
    assert torch.equal(second["bias/exp_avg"], first["bias/exp_avg"])
    assert second["bias/step"] == 3
    assert second["weight/step"] == 6


def test_optimiser_state_round_trips():
    forward = TinyForward()
    settings = OptimiserSettings(rate=0.1, state="keep")
    state = train(forward, None, settings).state
    optimiser = build_optimiser(parameters(forward), frozenset(), settings, state)
    for key, tensor in optimiser_state(optimiser, parameters(forward)).items():
        assert torch.equal(tensor, state[key])


def test_evaluation_is_per_example():
    forward = TinyForward()
    found = evaluate(forward, EXAMPLES, torch.tensor([7, 3, 11]), batch_size=2)
    logits = forward(torch.tensor([7, 3, 11]))
    right = logits.argmax(-1) == EXAMPLES.labels[[7, 3, 11]]
    assert torch.equal(found.correct, right.long())
    assert found.accuracy == pytest.approx(float(right.double().mean()))
    losses = nn.functional.cross_entropy(logits, EXAMPLES.labels[[7, 3, 11]], reduction="none")
    assert found.loss == pytest.approx(float(losses.mean()), rel=1e-6)
    assert found.on(torch.tensor([3])).accuracy == float(right[1])
    assert math.isnan(found.on(torch.tensor([5])).accuracy)
    assert math.isnan(evaluate(forward, EXAMPLES, EVERYTHING[:0]).accuracy)


def test_a_model_is_read_and_loaded_as_a_row():
    model = nn.Sequential()
    model.add_module("q", nn.Linear(6, 4))
    model.add_module("head", nn.Linear(4, 2))
    config = peft.LoraConfig(r=3, target_modules=["q"], modules_to_save=["head"])
    wrapped = peft.get_peft_model(model, config)
    binding = ModelBinding.of(wrapped)
    assert [slot.name for slot in binding.layout] == ["q.A", "q.B", "head.bias", "head.weight"]
    row = torch.randn(binding.layout.size)
    binding.load(row)
    layout = binding.layout
    live = dict(wrapped.named_parameters())
    b = live["base_model.model.q.lora_B.default.weight"]
    assert torch.equal(b, layout.view(row, layout.by_name["q.B"]).T)
    back = binding.read()
    for slot in layout:
        assert torch.equal(layout.view(back, slot), layout.view(row, slot))
    only_b = layout.select("B", dense=False)
    other = torch.randn(only_b.size)
    binding.load(other, only_b)
    assert torch.equal(binding.read(only_b)[: only_b.numel], other[: only_b.numel])
    trained = binding.trained({"B"})
    assert set(trained) == {"q.B", "head.bias", "head.weight"}
    assert [n for n, p in wrapped.named_parameters() if p.requires_grad and "lora_A" in n] == []
    with pytest.raises(FedcoreError, match="no trained parameter"):
        ModelBinding.of(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize(
    ("wide", "expected"), [("", torch.float32), ("head", torch.float64), ("lora", torch.float64)]
)
def test_a_row_of_a_model_is_as_wide_as_its_widest_bound_parameter(wide, expected):
    model = nn.Sequential()
    model.add_module("q", nn.Linear(6, 4))
    model.add_module("head", nn.Linear(4, 2))
    config = peft.LoraConfig(r=3, target_modules=["q"], modules_to_save=["head"])
    wrapped = peft.get_peft_model(model, config)
    # More digits than fp32 has.
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            parameter.copy_(torch.rand_like(parameter))
            if wide and parameter.requires_grad and wide in name:
                parameter.data = torch.rand(parameter.shape, dtype=torch.float64)
    binding = ModelBinding.of(wrapped)
    adapter = live_adapter(wrapped)
    layout = binding.layout
    assert adapter.layout() == layout
    row = binding.read()
    assert row.dtype == expected
    assert torch.equal(row, adapter.to_row(layout))
    # A part of the row has the row's dtype, or digests of the same part would differ.
    for part in (layout.select("A", dense=False), layout.select("B")):
        assert digest(binding.read(part), part) == digest(layout.gather(row, part), part)


def test_frozen_factors_are_bound_too():
    from fedcore.tuners import TriConfig

    model = nn.Sequential()
    model.add_module("q", nn.Linear(6, 4))
    model.add_module("head", nn.Linear(4, 2))
    config = TriConfig(r=2, target_modules=["q"], modules_to_save=["head"], init="random")
    wrapped = peft.get_peft_model(model, config)
    live = dict(wrapped.named_parameters())
    factors = {f: live[f"base_model.model.q.tri_{f}.default"] for f in "ABR"}
    assert {f: p.requires_grad for f, p in factors.items()} == {"A": False, "B": False, "R": True}
    binding = ModelBinding.of(wrapped)
    layout = binding.layout
    assert [slot.name for slot in layout] == ["q.A", "q.B", "q.R", "head.bias", "head.weight"]
    row = binding.read()
    for factor, parameter in factors.items():
        stored = parameter.T if factor == "B" else parameter
        assert torch.equal(layout.view(row, layout.by_name[f"q.{factor}"]), stored)
    for trains in ("R", "AR", "ABR", ""):
        chosen = binding.trained(trains)
        assert set(chosen) == {f"q.{f}" for f in trains} | {"head.bias", "head.weight"}
        assert {f for f, p in factors.items() if p.requires_grad} == set(trains)
    for parameter in wrapped.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(FedcoreError, match="no trained parameter"):
        ModelBinding.of(wrapped)
