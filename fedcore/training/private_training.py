"""One client's local training by DP-SGD: no single example decides much of what leaves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedcore.data.seeding import derive_seed
from fedcore.privacy.clipping import clipped_sum, with_noise
from fedcore.privacy.keyed_stream import KeyedStream
from fedcore.training.encoding import IGNORED, Examples
from fedcore.training.forward import Forward
from fedcore.training.local_training import LocalResult, LocalSettings
from fedcore.training.optimisers import OptimiserSettings, build_optimiser, optimiser_state
from fedcore.training.sample_gradients import SampleGradients, sample_gradients
from fedcore.training.schedules import enter_schedule


@dataclass(frozen=True)
class PrivateSettings:
    """``max_norm`` C of one example's gradient; noise of deviation ``noise_multiplier x C``."""

    noise_multiplier: float
    max_norm: float


def sampling_rate(batch_size: int, examples: int) -> float:
    """The probability with which a step takes each of ``examples``: ``batch_size`` on average."""
    return min(1.0, batch_size / examples)


def train_privately(
    model: nn.Module,
    forward: Forward,
    examples: Examples,
    indices: Tensor,
    parameters: Mapping[str, nn.Parameter],
    dense: frozenset[str],
    settings: LocalSettings,
    optimiser_settings: OptimiserSettings,
    private: PrivateSettings,
    *,
    seed: int,
    round: int = 0,
    rounds: int = 1,
    state: Mapping[str, Tensor] | None = None,
    on_step: Callable[[float], None] | None = None,
) -> LocalResult:
    """Train ``parameters`` on ``examples[indices]`` by DP-SGD (arXiv:1607.00133).

    A step takes each of the n examples with probability ``q = batch_size / n``, independently, as
    accountants of the subsampled Gaussian mechanism assume; clips the gradient of each example's
    loss over all parameters together to norm C; and hands the optimiser

        g = (sum_i clip(g_i) + N(0, (noise_multiplier C)^2)) / (q n).

    A step that takes no example is a step on noise alone. Everything is drawn from ``seed``, so who
    knows it can take the noise away again: that is right for a simulation, while a client of its
    own must keep its seed to itself.

    ``settings.clip_norm`` is not used, C takes its place; batches are worked on in parts of at most
    ``batch_size`` examples, whatever was drawn.

    Args:
        model: what ``forward`` runs, in which ``parameters`` are all that trains.
        round, rounds: which round of how many this is, from 0; where the schedule is entered.

    Returns:
        As :func:`~fedcore.training.local_training.train_client`; the loss is a mean over examples,
        which is not private.

    Raises:
        FedcoreError: per-sample gradients that are wrong, missing or not finite.
        MissingExtraError: Opacus is not installed.
    """
    keep = optimiser_settings.state == "keep"
    optimiser = build_optimiser(parameters, dense, optimiser_settings, state if keep else None)
    steps = settings.count_steps(len(indices))
    schedule, rate = optimiser_settings.schedule, optimiser_settings.rate
    scheduler = enter_schedule(
        optimiser, schedule, rate=rate, round=round, rounds=rounds, steps=steps
    )
    noise = KeyedStream(seed, "noise")
    losses: list[float] = []
    forward.train()
    with (
        torch.random.fork_rng(devices=forward.random_devices()),
        sample_gradients(model, parameters) as gradients,
    ):
        torch.manual_seed(derive_seed(seed, "dropout"))
        for batch in _poisson_batches(indices, settings.batch_size, steps, seed):
            sums, taken = _clipped(
                forward, examples, batch, parameters, gradients, settings, private
            )
            noisy = with_noise(sums, private.noise_multiplier * private.max_norm, noise)
            expected = sampling_rate(settings.batch_size, len(indices)) * len(indices)
            for name, parameter in parameters.items():
                parameter.grad = (noisy[name] / expected).to(parameter.dtype)
            optimiser.step()
            scheduler.step()
            losses += taken
            if on_step is not None:
                on_step(sum(taken) / len(taken) if taken else float("nan"))
    mean = sum(losses) / len(losses) if losses else float("nan")
    return LocalResult(mean, steps, optimiser_state(optimiser, parameters, state) if keep else {})


def example_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """``(B,)`` each example's mean cross-entropy over the predictions asked of it, in fp32.

    Args:
        logits: ``(B, ..., classes)``.
        targets: int64 ``(B, ...)``, :data:`~fedcore.training.encoding.IGNORED` where none is asked.
    """
    targets = targets.to(logits.device)
    single = nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    count = (targets != IGNORED).reshape(len(targets), -1).sum(1)
    return single.view(len(targets), -1).sum(1) / count.clamp(min=1)


def _clipped(
    forward: Forward,
    examples: Examples,
    batch: Tensor,
    parameters: Mapping[str, nn.Parameter],
    gradients: SampleGradients,
    settings: LocalSettings,
    private: PrivateSettings,
) -> tuple[dict[str, Tensor], list[float]]:
    """The sum of the clipped gradients of ``batch``, zero of none, and the examples' losses."""
    total = {
        # Noise is added before the sum is rounded to a parameter's own dtype.
        name: torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32)).to(p.device)
        for name, p in parameters.items()
    }
    losses: list[float] = []
    for part in batch.split(settings.batch_size) if len(batch) else ():
        part_losses = example_losses(forward(part), examples.targets(part))
        clipped = clipped_sum(gradients.of(part_losses), private.max_norm)
        total = {name: total[name] + clipped[name] for name in total}
        losses += part_losses.detach().tolist()
    return total, losses


def _poisson_batches(indices: Tensor, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    stream = KeyedStream(seed, "sampling")
    for _ in range(steps):
        draws = stream.uniform((len(indices),))
        yield indices[draws < sampling_rate(size, len(indices))]
