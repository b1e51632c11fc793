"""Wrong implementations that the small networks are to notice, and one that they do not notice."""

from functools import partial

import numpy as np
import pytest

from fedcore_theory.checks.networks import x01_digits as x1
from fedcore_theory.checks.networks import x01x_dead_relu as x1x
from fedcore_theory.models.digits import Trained, shipped, split_digits, train

_BRIEF = 12
"""Rounds after which FFA-LoRA's deficit shows already."""


def never_moves_a(method, uploads, start, round):
    return shipped(
        method, {**uploads, "A": np.broadcast_to(start["A"], uploads["A"].shape)}, start, round
    )


def keeps_the_first_client(method, uploads, start, round):
    first = {name: np.broadcast_to(values[:1], values.shape) for name, values in uploads.items()}
    return shipped(method, first, start, round)


def sums(method, uploads, start, round):
    count = len(uploads["A"])
    return shipped(method, {name: count * values for name, values in uploads.items()}, start, round)


def brief(digits, method, rate, rounds, **options):
    found = train(digits, method, rate, _BRIEF, **options)
    last = found.accuracy[-1:]
    return found._replace(
        accuracy=np.concatenate([found.accuracy, np.repeat(last, rounds - _BRIEF, 0)])
    )


@pytest.mark.parametrize("server", [never_moves_a, keeps_the_first_client])
def test_x1_rejects(server):
    def wrong(digits, method, rate, rounds):
        options = {"server": server} if method == "rolora" else {}
        return brief(digits, method, rate, rounds, **options)

    found = {one.what: one.holds for one in x1.CHECK.run(1, train=wrong).measured}
    assert not found["accuracy of RoLoRA less FFA-LoRA's, the smaller"]


def test_x1_rejects_a_server_that_sums():
    # The accuracies of the others, and of ten clients, are taken as known.
    known = {"fedit": 0.88, "ffa": 0.41, "rolora": 0.88}

    def wrong(digits, method, rate, rounds):
        if method == "rolora" and digits.inputs.shape[1] == 5:
            return train(digits, method, rate, rounds, server=sums)
        return Trained(np.full((rounds, 1), known[method]), digits.A, digits.A)

    failed = [one.what for one in x1.CHECK.run(1, train=wrong).measured if not one.holds]
    assert "accuracy of RoLoRA, 5 clients" in failed
    assert "accuracy of RoLoRA less LoRA's, the smaller" in failed


def test_x1_does_not_notice_that_both_factors_train_in_every_round():
    # It bounds what alternation loses against FedAvg of both factors, not what tells them apart.
    known = {"fedit": 0.88, "ffa": 0.41, "rolora": 0.88}

    def wrong(digits, method, rate, rounds):
        if method == "rolora" and digits.inputs.shape[1] == 5:
            return train(digits, "fedit", rate, rounds)
        return Trained(np.full((rounds, 1), known[method]), digits.A, digits.A)

    assert x1.CHECK.run(1, train=wrong).holds


def test_the_clients_share_no_label():
    digits = split_digits(0, 10, 2)
    labels = digits.labels.any(2)
    assert (labels.sum(1) == 1).all()
    assert (labels.sum(2) == 1).all()


def test_x1x_rejects_a_slope_at_zero():
    found = x1x.CHECK.run(1, flat=train)
    assert not found.measured[0].holds


def test_x1x_rejects_a_control_that_does_not_train():
    still = partial(train, slope_at_zero=False)
    found = x1x.CHECK.run(1, sloped=still)
    assert [one.holds for one in found.measured] == [True, True, False]
