"""An audit of what single uploads show: gradient matching on handwritten digits.

Everybody starts from a network that knows the digits 0 to 4. Clients fine-tune it for 5 to 9. The
adapter has seen ``warm_up`` steps of Adam on public pictures of 5 to 9 (at its start ``B`` is zero,
and with it the gradients of ``A`` and of a core); then one client takes one step on ``batch``
pictures of its own, and the server, which knows all but the pictures, tries to draw them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore.audit.gradient_matching import match_gradient
from fedcore.audit.image_quality import Quality, compare_pictures
from fedcore.audit.network import UPLOADS, AdaptedNetwork, Base, adapt
from fedcore.data.seeding import derive_seed
from fedcore.errors import FedcoreError, missing_extra, unknown_name

LEVELS = 16
PIXELS, CLASSES = 64, 10
SCALING = 2.0
CONTROLS = {
    "label mean": "no upload: mean of the label",
    "mean": "no upload: mean picture",
    "noise": "no upload: noise",
}
_PUBLIC = 900
_NEW = 5
_PRETRAINING = 100
_RATES = {"full": 1e-3}
_WARM_BATCH = 32


@dataclass(frozen=True)
class AuditSettings:
    """What is attacked, and how hard.

    Attributes:
        uploads: names of :data:`~fedcore.audit.network.UPLOADS`.
        batch: pictures in the client's step.
        seeds: repetitions, each with its own pictures, adapter and starts.
        rank: of every adapter, at most 10.
        layers: linear layers, all adapted: 64 -> 64 -> ... -> 10.
        warm_up: steps that the adapter has trained on public pictures before.
        starts, steps, refinements: as in
            :func:`~fedcore.audit.gradient_matching.match_gradient`.

    Raises:
        FedcoreError: an unknown upload or none, one twice, or a number out of its range.
    """

    uploads: tuple[str, ...] = tuple(UPLOADS)
    batch: int = 4
    seeds: int = 5
    rank: int = 4
    layers: int = 3
    warm_up: int = 20
    starts: int = 4
    steps: int = 400
    refinements: int = 400

    def __post_init__(self) -> None:
        if not self.uploads:
            raise FedcoreError(f"uploads is empty; pass one of {', '.join(UPLOADS)}")
        for i, name in enumerate(self.uploads):
            if name not in UPLOADS:
                raise unknown_name("upload", name, UPLOADS)
            if name in self.uploads[:i]:
                raise FedcoreError(f"upload {name} appears twice in uploads")
        ranges = {"batch": (1, 64), "seeds": (1, 1000), "rank": (1, CLASSES), "layers": (1, 16)}
        for name in ("warm_up", "steps", "refinements"):
            ranges[name] = (0, 100_000)
        ranges["starts"] = (1, 256)
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise FedcoreError(f"{name} is {value}; pass a number from {least} to {most}")


class Attempt(NamedTuple):
    """One attack, or one control.

    Attributes:
        name: the upload's or the control's.
        seed: the repetition.
        numbers: numbers uploaded; 0 for a control.
        directions: of the ``64 x batch`` unknowns, those that the upload shows, to first order at
            the truth; 0 for a control.
        silent: whether the uploaded gradient is exactly zero.
        loss: the least ``|g(x) - g|^2 / |g|^2``; ``None`` for a control.
        truth: ``(batch, 64)``.
        quality: how near the found pictures are, and the pictures.
    """

    name: str
    seed: int
    numbers: int
    directions: int
    silent: bool
    loss: float | None
    truth: Tensor
    quality: Quality


class Audit(NamedTuple):
    """The settings and every attempt, by seed and then in the order of uploads and controls."""

    settings: AuditSettings
    attempts: tuple[Attempt, ...]

    def of(self, name: str) -> list[Attempt]:
        """The attempts of one upload or control."""
        return [attempt for attempt in self.attempts if attempt.name == name]


class Digits(NamedTuple):
    """``public`` pictures and labels, and ``private`` ones of the new digits alone."""

    public: tuple[Tensor, Tensor]
    private: tuple[Tensor, Tensor]


def run_audit(settings: AuditSettings, done: Callable[[str], None] | None = None) -> Audit:
    """Attack every upload with every seed.

    Args:
        settings: what to attack.
        done: called after each attack with what it was.

    Raises:
        MissingExtraError: scikit-learn, which holds the pictures, or scipy is not installed.
    """
    digits = load_digits()
    base = pretrained(digits, settings.layers)
    attempts: list[Attempt] = []
    for seed in range(settings.seeds):
        pictures, labels = draw_batch(digits, settings.batch, seed)
        for upload in settings.uploads:
            network = warmed(base, upload, settings, digits, seed)
            attempts.append(_attack(network, pictures, labels, settings, seed))
            if done is not None:
                done(f"{upload}, seed {seed}")
        for name, guess in _guesses(digits, labels, seed).items():
            quality = compare_pictures(pictures, guess, LEVELS)
            attempts.append(Attempt(name, seed, 0, 0, False, None, pictures, quality))
    return Audit(settings, tuple(attempts))


def load_digits() -> Digits:
    """The 1797 pictures of 8 x 8 that come with scikit-learn; grey levels are multiples of 1/16."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise missing_extra("scikit-learn", "run") from error
    pictures, labels = load(return_X_y=True)
    generator = torch.Generator().manual_seed(derive_seed(0, "audit", "split"))
    order = torch.randperm(len(labels), generator=generator)
    x = torch.from_numpy(pictures)[order].double() / LEVELS
    y = torch.from_numpy(labels)[order]
    new = y[_PUBLIC:] >= _NEW
    return Digits((x[:_PUBLIC], y[:_PUBLIC]), (x[_PUBLIC:][new], y[_PUBLIC:][new]))


def pretrained(digits: Digits, layers: int) -> Base:
    """A network that has learnt the public pictures of 0 to 4."""
    pictures, labels = digits.public
    known = labels < _NEW
    generator = torch.Generator().manual_seed(derive_seed(0, "audit", "base"))
    network = adapt(Base.draw((*[PIXELS] * layers, CLASSES), generator), "full", 1, 1.0, generator)
    return _trained(network, [(pictures[known], labels[known])] * _PRETRAINING)


def warmed(
    base: Base, upload: str, settings: AuditSettings, digits: Digits, seed: int
) -> AdaptedNetwork:
    """The adapted network as the server and the client know it before the client's step."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "audit", upload))
    network = adapt(base, upload, settings.rank, SCALING, generator)
    pictures, labels = digits.public
    pictures, labels = pictures[labels >= _NEW], labels[labels >= _NEW]
    batches = []
    for _ in range(settings.warm_up):
        chosen = torch.randint(len(labels), (_WARM_BATCH,), generator=generator)
        batches.append((pictures[chosen], labels[chosen]))
    return network.with_parameters(_steps(network, batches, _RATES.get(upload, 1e-2)))


def draw_batch(digits: Digits, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """The client's pictures and labels: other ones for each seed, the same for each upload."""
    pictures, labels = digits.private
    generator = torch.Generator().manual_seed(derive_seed(seed, "audit", "batch"))
    chosen = torch.randperm(len(labels), generator=generator)[:size]
    return pictures[chosen], labels[chosen]


def _attack(
    network: AdaptedNetwork, pictures: Tensor, labels: Tensor, settings: AuditSettings, seed: int
) -> Attempt:
    observed = network.gradient(pictures[None], labels)[0].detach()
    match = match_gradient(
        partial(network.gradient, labels=labels),
        observed,
        (len(labels), pictures.shape[1]),
        derive_seed(seed, "audit", "starts"),
        settings.starts,
        settings.steps,
        settings.refinements,
    )
    quality = compare_pictures(pictures, match.pictures, LEVELS)
    silent = not bool(observed.any())
    name = network.kind.name
    directions = network.directions(pictures, labels)
    return Attempt(name, seed, network.numbers, directions, silent, match.loss, pictures, quality)


def _guesses(digits: Digits, labels: Tensor, seed: int) -> dict[str, Tensor]:
    """What anyone can draw who has the labels and public pictures of the kind, and no upload."""
    pictures, theirs = digits.public
    kind = theirs >= _NEW
    generator = torch.Generator().manual_seed(derive_seed(seed, "audit", "noise"))
    shape = (len(labels), pictures.shape[1])
    return {
        "label mean": torch.stack([pictures[theirs == label].mean(0) for label in labels]),
        "mean": pictures[kind].mean(0).expand(shape),
        "noise": torch.rand(*shape, generator=generator, dtype=torch.float64),
    }


def _trained(network: AdaptedNetwork, batches: Sequence[tuple[Tensor, Tensor]]) -> Base:
    return network.effective(_steps(network, batches, 1e-3))


def _steps(
    network: AdaptedNetwork, batches: Sequence[tuple[Tensor, Tensor]], rate: float
) -> dict[str, Tensor]:
    """What trains, after one step of Adam on each batch."""
    moved = {name: v.clone().requires_grad_() for name, v in network.trained.items()}
    adam = torch.optim.Adam(moved.values(), rate)
    for pictures, labels in batches:
        slopes = torch.autograd.grad(network.loss(moved, pictures, labels), [*moved.values()])
        for values, slope in zip(moved.values(), slopes, strict=True):
            values.grad = slope
        adam.step()
    return {name: values.detach() for name, values in moved.items()}
