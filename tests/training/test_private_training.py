import math
from itertools import pairwise

import pytest
import torch
from opacus.optimizers import DPOptimizer
from torch import nn

from fedcore.errors import FedcoreError
from fedcore.privacy.clipping import with_noise
from fedcore.privacy.keyed_stream import KeyedStream
from fedcore.training import private_training
from fedcore.training.encoding import IGNORED, EncodedDataset
from fedcore.training.local_training import LocalSettings
from fedcore.training.optimisers import OptimiserSettings
from fedcore.training.private_training import (
    PrivateSettings,
    example_losses,
    sampling_rate,
    train_privately,
)

COUNT = 40
GENERATOR = torch.Generator().manual_seed(0)
EXAMPLES = EncodedDataset(
    torch.randint(0, 5, (COUNT, 3), generator=GENERATOR),
    torch.ones(COUNT, 3, dtype=torch.int64),
    torch.randint(0, 2, (COUNT,), generator=GENERATOR),
)
EVERYTHING = torch.arange(COUNT)
SGD = OptimiserSettings(name="sgd", rate=0.1)
QUIET = 1e-9


class TinyForward:
    """A linear classifier on three tokens, which notes the batches that it sees."""

    def __init__(self, dropout: float = 0.0) -> None:
        self.layer = nn.Linear(3, 2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(6.0).reshape(2, 3) / 10)
            self.layer.bias.zero_()
        self.dropout = nn.Dropout(dropout)
        self.seen: list[torch.Tensor] = []

    def __call__(self, batch):
        self.seen.append(batch)
        return self.layer(self.dropout(EXAMPLES.input_ids[batch].float()))

    def train(self):
        self.dropout.train()

    def random_devices(self):
        return []

    @property
    def parameters(self):
        return {"weight": self.layer.weight, "bias": self.layer.bias}

    @property
    def values(self):
        return torch.cat([p.detach().flatten().clone() for p in self.parameters.values()])


def train(forward, private, size=COUNT, steps=1, optimiser=SGD, **named):
    return train_privately(
        forward.layer,
        forward,
        EXAMPLES,
        named.pop("indices", EVERYTHING),
        forward.parameters,
        frozenset({"bias"}),
        LocalSettings(batch_size=size, steps=steps, clip_norm=1e-9),
        optimiser,
        private,
        seed=named.pop("seed", 0),
        **named,
    )


def gradient_rows(forward: TinyForward, indices: torch.Tensor) -> torch.Tensor:
    """Autograd, one example at a time: ``(n, 8)``."""
    rows = []
    for i in indices.tolist():
        loss = nn.functional.cross_entropy(forward(torch.tensor([i])), EXAMPLES.labels[i : i + 1])
        found = torch.autograd.grad(loss, list(forward.parameters.values()))
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def cut(rows: torch.Tensor, bound: float) -> torch.Tensor:
    return rows * (bound / rows.norm(dim=1).clamp(min=bound))[:, None]


@pytest.mark.parametrize("bound", [1e3, 0.4])
def test_a_step_on_everything_is_the_mean_of_the_cut_gradients(bound):
    forward = TinyForward()
    before, rows = forward.values, gradient_rows(forward, EVERYTHING)
    assert bool((rows.norm(dim=1) > 0.4).any())
    assert bool((rows.norm(dim=1) < 1e3).all())
    train(forward, PrivateSettings(QUIET, bound))
    expected = before - 0.1 * cut(rows, bound).sum(0) / COUNT
    torch.testing.assert_close(forward.values, expected, rtol=1e-5, atol=1e-7)
    assert float((forward.values - before).norm()) > 1e-3


def test_steps_on_samples_divide_by_the_size_that_is_expected():
    forward, twin = TinyForward(), TinyForward()
    train(forward, PrivateSettings(QUIET, 0.4), size=10, steps=5, seed=3)
    stream = KeyedStream(3, "sampling")
    for _ in range(5):
        chosen = EVERYTHING[stream.uniform((COUNT,)) < 0.25]
        step = 0.1 * cut(gradient_rows(twin, chosen), 0.4).sum(0) / 10
        with torch.no_grad():
            twin.layer.weight -= step[:6].reshape(2, 3)
            twin.layer.bias -= step[6:]
    torch.testing.assert_close(forward.values, twin.values, rtol=1e-5, atol=1e-7)


def test_a_step_without_noise_is_that_of_opacus():
    forward, twin = TinyForward(), TinyForward()
    train(forward, PrivateSettings(QUIET, 0.4))
    rows = gradient_rows(twin, EVERYTHING)
    twin.layer.weight.grad_sample = rows[:, :6].reshape(-1, 2, 3)
    twin.layer.bias.grad_sample = rows[:, 6:]
    optimiser = DPOptimizer(
        torch.optim.SGD(twin.parameters.values(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=0.4,
        expected_batch_size=COUNT,
    )
    optimiser.step()
    torch.testing.assert_close(forward.values, twin.values, rtol=1e-4, atol=1e-6)


def test_noise_is_as_wide_as_the_accountant_assumes():
    # The step minus the noiseless step is the rate times noise of deviation  5 C / (q n).
    moves = []
    for seed in range(120):
        forward, silent = TinyForward(), TinyForward()
        train(forward, PrivateSettings(5.0, 0.4), size=10, seed=seed)
        train(silent, PrivateSettings(QUIET, 0.4), size=10, seed=seed)
        moves.append(forward.values - silent.values)
    values = torch.cat(moves).double()
    expected = 0.1 * 5.0 * 0.4 / 10
    assert float(values.std()) == pytest.approx(expected, rel=6 / math.sqrt(2 * len(values)))
    assert abs(float(values.mean())) < 6 * expected / math.sqrt(len(values))


def test_each_step_draws_noise_of_its_own():
    forward = TinyForward()
    gradients = []
    build = OptimiserSettings(name="sgd", rate=1.0)
    seen = [forward.values]
    train(
        forward,
        PrivateSettings(1e4, 1.0),
        steps=3,
        optimiser=build,
        on_step=lambda _: seen.append(forward.values),
    )
    gradients = [after - before for before, after in pairwise(seen)]
    assert len(gradients) == 3
    for one, other in [(0, 1), (1, 2), (0, 2)]:
        assert abs(float(torch.corrcoef(torch.stack([gradients[one], gradients[other]]))[0, 1])) < 1
        assert not torch.allclose(gradients[one], gradients[other], rtol=0.1)


def test_every_example_is_drawn_at_the_rate_and_independently():
    forward = TinyForward()
    train(forward, PrivateSettings(1.0, 1.0), size=16, steps=300)
    # Parts of one draw are at most 16 long, so draws are put together again by their order.
    sizes, counts, last = [], torch.zeros(COUNT), COUNT
    for part in forward.seen:
        assert len(part) <= 16
        counts[part] += 1
        if int(part[0]) <= last:
            sizes.append(0)
        sizes[-1] += len(part)
        last = int(part[-1])
    rate = 16 / COUNT
    assert abs(float((counts / 300 - rate).abs().max())) < 6 * math.sqrt(rate * (1 - rate) / 300)
    spread = torch.tensor(sizes, dtype=torch.float64)
    assert float(spread.mean()) == pytest.approx(16, rel=0.05)
    assert float(spread.var()) == pytest.approx(COUNT * rate * (1 - rate), rel=0.5)


def test_a_draw_of_nothing_is_a_step_on_noise():
    forward = TinyForward()
    losses = []
    before = forward.values
    result = train(
        forward,
        PrivateSettings(2.0, 1.0),
        size=1,
        steps=1,
        indices=EVERYTHING[:2],
        seed=_seed_of_an_empty_draw(),
        on_step=losses.append,
    )
    assert forward.seen == []
    assert result.steps == len(losses) == 1
    assert math.isnan(result.loss)
    assert float((forward.values - before).abs().min()) > 0


def test_noise_meets_sums_in_fp32_also_of_halved_parameters(monkeypatch):
    forward, seen = TinyForward(), []
    forward.layer.bfloat16()

    def recorded(sums, deviation, stream):
        seen.extend(total.dtype for total in sums.values())
        return with_noise(sums, deviation, stream)

    monkeypatch.setattr(private_training, "with_noise", recorded)
    few, seed = EVERYTHING[:2], _seed_of_an_empty_draw()
    train(forward, PrivateSettings(2.0, 1.0), size=1, steps=1, indices=few, seed=seed)
    assert seen == [torch.float32] * 2


def _seed_of_an_empty_draw() -> int:
    for seed in range(100):
        if bool((KeyedStream(seed, "sampling").uniform((2,)) >= 0.5).all()):
            return seed
    raise AssertionError("no seed draws nothing")


def test_a_client_without_examples_makes_no_step():
    forward = TinyForward()
    before = forward.values
    result = train(forward, PrivateSettings(1.0, 1.0), steps=4, indices=EVERYTHING[:0])
    assert result.steps == 0
    assert math.isnan(result.loss)
    assert torch.equal(forward.values, before)


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    found = []
    for seed, elsewhere in ((0, 1), (0, 2), (1, 1)):
        forward = TinyForward(dropout=0.5)
        torch.manual_seed(elsewhere)
        before = torch.random.get_rng_state()
        train(forward, PrivateSettings(1.0, 1.0), size=10, steps=3, seed=seed)
        assert torch.equal(before, torch.random.get_rng_state())
        found.append(forward.values)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_optimiser_state_is_kept_where_it_is_asked_for():
    forward = TinyForward()
    keep = OptimiserSettings(name="adamw", rate=0.01, state="keep")
    first = train(forward, PrivateSettings(1.0, 1.0), optimiser=keep)
    second = train(forward, PrivateSettings(1.0, 1.0), optimiser=keep, state=first.state)
    assert float(first.state["weight/step"]) == 1
    assert float(second.state["weight/step"]) == 2
    reset = train(forward, PrivateSettings(1.0, 1.0))
    assert reset.state == {}


def test_the_loss_is_the_mean_over_the_examples_seen():
    forward = TinyForward()
    expected = nn.functional.cross_entropy(forward(EVERYTHING), EXAMPLES.labels)
    result = train(forward, PrivateSettings(1.0, 1.0))
    assert result.loss == pytest.approx(float(expected.detach()), rel=1e-6)


def test_a_gradient_that_is_not_finite_stops_the_client():
    forward = TinyForward()
    with torch.no_grad():
        forward.layer.weight[0, 0] = math.nan
    with pytest.raises(FedcoreError, match="NaN or infinite"):
        train(forward, PrivateSettings(1.0, 1.0))


def test_rates():
    assert sampling_rate(8, 32) == 0.25
    assert sampling_rate(8, 8) == sampling_rate(8, 3) == 1.0


def test_losses_of_single_examples():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 4, 5, generator=generator)
    targets = torch.tensor([[1, 2, 3, IGNORED], [0, IGNORED, IGNORED, IGNORED], [IGNORED] * 4])
    found = example_losses(logits, targets)
    logs = -logits.log_softmax(-1)
    first = (logs[0, 0, 1] + logs[0, 1, 2] + logs[0, 2, 3]) / 3
    assert found.tolist() == pytest.approx([float(first), float(logs[1, 0, 0]), 0.0])
    labels = torch.tensor([4, 0, 2])
    single = nn.functional.cross_entropy(logits[:, 0], labels, reduction="none")
    torch.testing.assert_close(example_losses(logits[:, 0], labels), single)
