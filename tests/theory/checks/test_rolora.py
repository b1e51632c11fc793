"""Wrong implementations that RoLoRA's checks are to notice."""

import numpy as np
import pytest

from fedcore_theory.checks.rolora import r01_exact_alternation as r1
from fedcore_theory.models.factors import ClientFactors
from fedcore_theory.rounds import server_round


def averages_both(uploads, start, round):
    other = ClientFactors(
        uploads.A + np.arange(len(uploads.A))[:, None, None], uploads.B, uploads.weights
    )
    return server_round("fedit", {"A": other.A, "B": other.B}, uploads.weights)


def forgets_the_weights(uploads, start, round):
    return r1.shipped(ClientFactors(uploads.A, uploads.B, np.ones(len(uploads.A))), start, round)


def holds_a_stale_factor(uploads, start, round):
    stale = ClientFactors(start.A * (1 + 1e-3), start.B * (1 + 1e-3), start.weights)
    return r1.shipped(uploads, stale, round)


def halves_the_frozen_factor_s_precision(uploads, start, round):
    half = [values.astype(np.float16).astype(float) for values in (start.A, start.B)]
    return r1.shipped(uploads, ClientFactors(*half, start.weights), round)


@pytest.mark.parametrize(
    "step",
    [
        averages_both,
        forgets_the_weights,
        holds_a_stale_factor,
        halves_the_frozen_factor_s_precision,
    ],
)
def test_r1_rejects(step):
    assert not r1.CHECK.run(2, step=step).holds
