import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import FedcoreError
from fedcore.privacy.central import noisy_mean
from fedcore.privacy.keyed_stream import KeyedStream
from fedcore_kernels.layout import FactorLayout

LAYOUT = FactorLayout.build([("m", "A", 2, 5)], [("bias", (3,))])
QUIET = 1e-12


def rows(seed: int, n: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(n, LAYOUT.size, dtype=torch.float64)
    for row in found:
        for slot in LAYOUT:
            view = LAYOUT.view(row, slot)
            view.copy_(scale * torch.randn(view.shape, generator=generator, dtype=torch.float64))
    return found


def mean(updates, reference, bound=1.0, noise=QUIET, expected=None, seed=0):
    return noisy_mean(
        updates,
        reference,
        LAYOUT,
        max_norm=bound,
        noise_multiplier=noise,
        expected=expected or len(updates),
        stream=KeyedStream(seed),
    )


@given(seed=st.integers(0, 10**6), n=st.integers(1, 5), scale=st.sampled_from([0.01, 1.0, 30.0]))
def test_it_is_the_reference_plus_the_mean_of_the_cut_moves(seed, n, scale):
    reference, moves = rows(seed + 1, 1)[0], rows(seed, n, scale)
    expected = reference.clone()
    for move in moves:
        expected += move * min(1.0, 0.8 / float(move.norm())) / n
    found = mean(reference + moves, reference, bound=0.8)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 10**6), n=st.integers(0, 4))
def test_one_client_moves_the_sum_by_the_bound_at_most(seed, n):
    reference, everyone = rows(seed + 1, 1)[0], rows(seed, n + 1, 9.0)
    one = mean(everyone, reference, bound=0.5, expected=4.0)
    other = mean(everyone[:n], reference, bound=0.5, expected=4.0)
    assert float((one - other).norm()) <= 0.5 / 4 * (1 + 1e-9)


def test_noise_is_as_wide_as_it_should_be_and_only_in_the_tensors():
    reference = rows(3, 1)[0]
    noise = torch.stack(
        [mean(rows(0, 0), reference, 0.5, 4.0, 10.0, seed) - reference for seed in range(600)]
    )
    used = torch.zeros(LAYOUT.size)
    for slot in LAYOUT:
        LAYOUT.view(used, slot).fill_(1)
    assert int(used.sum()) == 13 < LAYOUT.size
    assert bool((noise[:, used == 0] == 0).all())
    values = noise[:, used == 1].flatten()
    assert float(values.std()) == pytest.approx(0.2, rel=6 / math.sqrt(2 * len(values)))
    assert abs(float(values.mean())) < 6 * 0.2 / math.sqrt(len(values))


@pytest.mark.parametrize("name", ["bound", "noise", "expected"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_settings_that_mean_nothing(name, value):
    with pytest.raises(FedcoreError, match=f"is {value}"):
        mean(rows(0, 2), rows(1, 1)[0], **{name: value})
