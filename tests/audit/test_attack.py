"""The audit as a whole: its controls, what is fair in it, and what comes out."""

from __future__ import annotations

import pytest
import torch

from fedcore.audit.attack import (
    CONTROLS,
    LEVELS,
    AuditSettings,
    draw_batch,
    load_digits,
    pretrained,
    run_audit,
    warmed,
)
from fedcore.audit.network import UPLOADS
from fedcore.errors import FedcoreError

SMALL = AuditSettings(batch=1, seeds=2, starts=1, steps=100, refinements=120)


@pytest.fixture(scope="module")
def audit():
    return run_audit(SMALL)


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_every_upload_and_control_is_attacked_on_the_same_pictures(audit, digits):
    names = [*UPLOADS, *CONTROLS]
    assert [(a.seed, a.name) for a in audit.attempts] == [(s, n) for s in range(2) for n in names]
    for seed in range(2):
        expected, _ = draw_batch(digits, 1, seed)
        for name in names:
            assert torch.equal(audit.of(name)[seed].truth, expected)
    first, second = (audit.of("full")[seed].truth for seed in range(2))
    assert not torch.equal(first, second)


def test_full_gradients_show_a_picture_and_a_small_core_does_not(audit):
    for seed in range(2):
        psnr = {name: audit.of(name)[seed].quality.psnr for name in (*UPLOADS, *CONTROLS)}
        assert psnr["full"] > 45
        assert min(psnr["lora"], psnr["florg"]) > 25 > 20 > psnr["label mean"]
        assert psnr["ce_lora"] < psnr["label mean"]
        assert psnr["noise"] < psnr["mean"]
        assert audit.of("full")[seed].quality.exact == 1.0
        core = audit.of("ce_lora")[seed]
        # It is not the optimiser that fails: the gradient matches, and is that of other pictures.
        assert core.loss < 1e-2
        assert (core.numbers, core.directions) == (48, 3 * 7)
        assert audit.of("full")[seed].directions == 64
        assert not core.silent


def test_controls_see_public_pictures_and_labels_alone(audit, digits):
    pictures, labels = digits.public
    for seed in range(2):
        _, drawn = draw_batch(digits, 1, seed)
        guess = audit.of("label mean")[seed]
        assert torch.equal(guess.quality.pictures[0], pictures[labels == drawn[0]].mean(0))
        assert (guess.loss, guess.numbers, guess.directions) == (None, 0, 0)
        middle = audit.of("mean")[seed].quality.pictures[0]
        assert torch.allclose(middle, pictures[labels >= 5].mean(0))


def test_public_and_private_pictures_are_apart(digits):
    private, labels = digits.private
    assert set(labels.tolist()) == {5, 6, 7, 8, 9}
    assert len(digits.public[0]) == 900
    public = {tuple(row) for row in digits.public[0].tolist()}
    assert not any(tuple(row) in public for row in private.tolist())
    assert torch.equal(private * LEVELS, (private * LEVELS).round())
    assert float(private.max()) <= 1


def test_the_base_knows_the_old_digits_and_warming_learns_the_new(digits):
    base = pretrained(digits, 3)
    pictures, labels = digits.public
    right = base.logits(pictures).argmax(1) == labels
    assert float(right[labels < 5].double().mean()) > 0.9
    assert float(right[labels >= 5].double().mean()) < 0.1
    pictures, labels = digits.private
    losses = []
    for steps in (0, 20):
        settings = AuditSettings(warm_up=steps)
        network = warmed(base, "lora", settings, digits, 0)
        losses.append(float(network.loss({}, pictures, labels)))
    assert losses[1] < 0.5 * losses[0]


def test_without_warm_up_a_core_is_silent():
    settings = AuditSettings(("ce_lora",), batch=1, seeds=1, warm_up=0, steps=1, refinements=0)
    (core,) = run_audit(settings).of("ce_lora")
    assert core.silent
    assert (core.loss, core.directions) == (0.0, 0)


def test_progress_is_told_of_each_attack():
    told = []
    settings = AuditSettings(("full", "ffa"), batch=1, seeds=2, starts=1, steps=1, refinements=0)
    run_audit(settings, told.append)
    assert told == ["full, seed 0", "ffa, seed 0", "full, seed 1", "ffa, seed 1"]


def test_refusals():
    for arguments, message in (
        ({"uploads": ()}, "uploads is empty"),
        ({"uploads": ("loar",)}, "unknown upload 'loar'; did you mean lora"),
        ({"uploads": ("ffa", "ffa")}, "upload ffa appears twice"),
        ({"batch": 0}, "batch is 0; pass a number from 1 to 64"),
        ({"rank": 11}, "rank is 11; pass a number from 1 to 10"),
        ({"warm_up": -1}, "warm_up is -1"),
        ({"layers": 17}, "layers is 17"),
    ):
        with pytest.raises(FedcoreError, match=message):
            AuditSettings(**arguments)
