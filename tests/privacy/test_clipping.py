import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import FedcoreError
from fedcore.privacy.clipping import clipped_sum, sample_norms, with_noise
from fedcore.privacy.keyed_stream import KeyedStream


def gradients(seed: int, n: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 2), "b": (4,)}
    return {
        name: scale * torch.randn(n, *shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def flat(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([found[name].flatten() for name in sorted(found)])


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 6),
    scale=st.sampled_from([1e-3, 0.3, 1.0, 40.0]),
    bound=st.sampled_from([0.1, 1.0, 7.0]),
)
def test_the_sum_is_that_of_each_example_cut_to_the_bound(seed, n, scale, bound):
    given_ = gradients(seed, n, scale)
    expected = torch.zeros(10, dtype=torch.float64)
    for i in range(n):
        row = flat({name: g[i] for name, g in given_.items()})
        expected += row * min(1.0, bound / float(row.norm()))
    torch.testing.assert_close(flat(clipped_sum(given_, bound)), expected, rtol=1e-12, atol=1e-15)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), place=st.integers(0, 5))
def test_one_example_moves_the_sum_by_the_bound_at_most(seed, n, place):
    everyone = gradients(seed, n + 1, 5.0)
    others = {
        name: torch.cat([g[: place % (n + 1)], g[place % (n + 1) + 1 :]])
        for name, g in everyone.items()
    }
    moved = flat(clipped_sum(everyone, 0.7)) - flat(clipped_sum(others, 0.7))
    assert float(moved.norm()) <= 0.7 * (1 + 1e-12)
    assert float(moved.norm()) >= 0.7 * (1 - 1e-9) or float(sample_norms(everyone).min()) < 0.7


def test_the_norm_is_over_all_tensors_together():
    given_ = {"a": torch.tensor([[3.0]]), "b": torch.tensor([[4.0]])}
    assert sample_norms(given_).tolist() == [5.0]
    found = clipped_sum(given_, 1.0)
    assert [float(found[n]) for n in "ab"] == pytest.approx([0.6, 0.8])


def test_zero_gradients_stay_zero():
    found = clipped_sum({"a": torch.zeros(2, 3)}, 1.0)
    assert torch.equal(found["a"], torch.zeros(3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_no_factor_bounds_is_refused(bad):
    given_ = gradients(0, 3)
    given_["b"][1, 2] = bad
    with pytest.raises(FedcoreError, match="example 1 of the batch is NaN or infinite"):
        clipped_sum(given_, 1.0)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_that_bounds_nothing_is_refused(bound):
    with pytest.raises(FedcoreError, match="max_norm is"):
        clipped_sum(gradients(0, 2), bound)


def test_noise_has_the_deviation_that_is_asked_for():
    sums = {"b": torch.full((200, 100), 2.0), "a": torch.zeros(20_000)}
    found = with_noise(sums, 3.0, KeyedStream(1))
    noise = {name: (found[name] - sums[name]).flatten().double() for name in sums}
    for values in noise.values():
        # Six standard errors of 20 000 draws.
        assert abs(float(values.mean())) < 6 * 3.0 / math.sqrt(20_000)
        assert abs(float(values.std()) / 3.0 - 1) < 6 / math.sqrt(2 * 20_000)
        kurtosis = float((values / 3.0).pow(4).mean())
        assert abs(kurtosis - 3) < 6 * math.sqrt(96 / 20_000)
    assert abs(float(torch.corrcoef(torch.stack(list(noise.values())))[0, 1])) < 6 / math.sqrt(2e4)


def test_noise_follows_from_the_stream_and_the_names_alone():
    sums = {"b": torch.zeros(3), "a": torch.zeros(4)}
    other = {"a": torch.zeros(4), "b": torch.zeros(3)}
    one = with_noise(sums, 1.0, KeyedStream(5))
    two = with_noise(other, 1.0, KeyedStream(5))
    assert all(torch.equal(one[name], two[name]) for name in sums)
    stream = KeyedStream(5)
    first, second = (with_noise(sums, 1.0, stream) for _ in range(2))
    assert not torch.equal(first["a"], second["a"])
