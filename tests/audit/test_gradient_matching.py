"""The attack where the answer is known, and its refusals."""

from __future__ import annotations

from functools import partial
from math import nan

import pytest
import torch

from fedcore.audit.gradient_matching import match_gradient
from fedcore.audit.network import Base, adapt
from fedcore.errors import FedcoreError


def linear_model(classes: int = 5, pixels: int = 12, upload: str = "full", rank: int = 3):
    generator = torch.Generator().manual_seed(0)
    network = adapt(Base.draw((pixels, classes), generator), upload, rank, 1.0, generator)
    picture = torch.rand(1, pixels, generator=generator, dtype=torch.float64)
    labels = torch.tensor([2])
    return network, picture, labels, network.gradient(picture[None], labels)[0].detach()


def test_one_picture_through_a_linear_model_is_recovered_as_by_the_quotient():
    """``dW = delta x^T`` and ``db = delta``, so ``x = dW_i / db_i`` for every class i."""
    network, picture, labels, observed = linear_model()
    dense, bias = observed[:60].view(5, 12), observed[60:]
    for quotient in dense / bias[:, None]:
        assert torch.allclose(quotient, picture[0], atol=1e-12)
    found = match_gradient(partial(network.gradient, labels=labels), observed, (1, 12), seed=3)
    assert found.loss < 1e-12
    assert float((found.pictures - picture).abs().max()) < 1e-5
    assert len(found.losses) == 4
    assert found.loss == min(found.losses)


def test_the_best_objective_wins_not_the_first_start():
    network, _, labels, observed = linear_model()
    gradient = partial(network.gradient, labels=labels)
    found = match_gradient(gradient, observed, (1, 12), 3, starts=8, steps=0, refinements=0)
    assert found.loss == min(found.losses) < found.losses[0]
    energy = observed.square().sum()
    mine = (gradient(found.pictures[None])[0] - observed).square().sum() / energy
    assert float(mine) == pytest.approx(found.loss, rel=1e-12)
    losses = [
        match_gradient(gradient, observed, (1, 12), 3, steps=s, refinements=r).loss
        for s, r in ((0, 0), (40, 0), (40, 40))
    ]
    assert losses[0] > 10 * losses[1] > 100 * losses[2]


def test_what_a_factor_hides_is_not_recovered_though_the_gradient_matches():
    """FFA-LoRA on one linear layer shows ``delta (A x)^T``: r numbers of x, up to what delta is."""
    network, picture, labels, observed = linear_model(upload="ffa")
    found = match_gradient(
        partial(network.gradient, labels=labels), observed, (1, 12), 3, refinements=200
    )
    assert found.loss < 1e-8
    A = network.parameters["0.A"]
    difference = (found.pictures - picture)[0]
    assert float(difference.abs().max()) > 0.05
    # Pictures that A and the weights cannot tell apart have one and the same upload.
    shown = torch.cat([A, network.base.weights[0]])
    away = torch.linalg.svd(shown).Vh[-1]
    assert float((shown @ away).norm()) < 1e-12
    twin = network.gradient((picture + away)[None], labels)[0]
    assert float((twin - observed).norm()) < 1e-12 * float(observed.norm())
    assert network.directions(picture, labels) < 12


def test_a_zero_gradient_returns_the_start():
    network, _, labels, observed = linear_model(upload="ce_lora")
    assert not observed.any()
    gradient = partial(network.gradient, labels=labels)
    found = match_gradient(gradient, observed, (1, 12), 5)
    start = torch.rand(4, 1, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.equal(found.pictures, start[0])
    assert (found.loss, found.losses) == (0.0, (0.0,) * 4)


def test_the_same_seed_gives_the_same_bits_and_inputs_stay():
    network, _, labels, observed = linear_model()
    gradient = partial(network.gradient, labels=labels)
    kept = observed.clone()
    first, again, other = (
        match_gradient(gradient, observed, (1, 12), seed, steps=20, refinements=5)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.pictures, again.pictures)
    assert not torch.equal(first.pictures, other.pictures)
    assert torch.equal(observed, kept)
    for refinements in (0, 5):
        found = match_gradient(gradient, observed, (1, 12), 1, steps=20, refinements=refinements)
        assert 0 <= float(found.pictures.min()) <= float(found.pictures.max()) <= 1


def test_pictures_stay_in_their_range_where_a_better_match_is_outside():
    observed = torch.tensor([-1.0, 1.0, 2.0], dtype=torch.float64)
    found = match_gradient(lambda x: x[:, 0], observed, (1, 3), 0, steps=100, refinements=0)
    assert float(found.pictures[0, 0]) == 0.0
    assert float(found.pictures.max()) <= 1.0


def test_refusals():
    network, _, labels, observed = linear_model()
    attack = partial(match_gradient, partial(network.gradient, labels=labels))
    for arguments, message in (
        ({"starts": 0}, "starts is 0; pass at least 1"),
        ({"steps": -1}, "steps is -1; pass 0 or more"),
        ({"refinements": -2}, "refinements is -2"),
    ):
        with pytest.raises(FedcoreError, match=message):
            attack(observed, (1, 12), 0, **arguments)
    with pytest.raises(FedcoreError, match="not finite"):
        attack(torch.full_like(observed, nan), (1, 12), 0)
    with pytest.raises(FedcoreError, match=r"observed has shape \(64,\); .* \(65,\)"):
        attack(observed[:-1], (1, 12), 0)
