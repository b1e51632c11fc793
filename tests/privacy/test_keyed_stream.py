import math

import pytest
import torch
from scipy.stats import kstest

from fedcore.privacy.keyed_stream import SECRET_BITS, KeyedStream


def test_the_same_seed_and_purpose_give_the_same_numbers_and_others_do_not():
    first, again = (KeyedStream(3, "noise", 1) for _ in range(2))
    for _ in range(2):
        assert torch.equal(first.normal((3, 2)), again.normal((3, 2)))
    start = KeyedStream(3, "noise", 1).normal((6,))
    for other in (KeyedStream(4, "noise", 1), KeyedStream(3, "sampling", 1), KeyedStream(3)):
        assert not bool((other.normal((6,)) == start).any())


@pytest.mark.parametrize("bit", [0, 31, 32, 63, 64, SECRET_BITS - 1])
def test_every_bit_of_a_seed_counts(bit):
    """torch's generator forgets all above 32, and clients would share their noise."""
    plain, other = KeyedStream(5, "noise"), KeyedStream(5 ^ 1 << bit, "noise")
    assert not bool((plain.normal((8,)) == other.normal((8,))).any())


def test_no_call_repeats_another():
    stream = KeyedStream(0, "noise")
    rows = torch.stack([stream.normal((500,)) for _ in range(4)])
    apart = torch.corrcoef(rows) - torch.eye(4, dtype=torch.float64)
    assert float(apart.abs().max()) < 6 / math.sqrt(500)


def test_numbers_have_the_distributions_that_they_claim():
    stream = KeyedStream(1, "noise")
    normal, uniform = stream.normal((40_001,)), stream.uniform((200, 200))
    assert kstest(normal.numpy(), "norm").pvalue > 1e-3
    assert kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3
    # Both halves of Box and Muller's pairs, which must not lean on each other.
    cosine, sine = normal[:20_000], normal[20_001:40_001]
    for transform in (torch.abs, torch.square, lambda x: x):
        pair = torch.stack([transform(cosine), transform(sine)])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 6 / math.sqrt(20_000)
    assert 0 <= float(uniform.min()) < 1e-3 < 1 - 1e-3 < float(uniform.max()) < 1
    assert torch.equal(uniform * 2.0**53, (uniform * 2.0**53).round())


def test_shapes():
    stream = KeyedStream(0)
    for shape in ((), (0,), (1,), (3,), (2, 3, 5)):
        for found in (stream.uniform(shape), stream.normal(shape)):
            assert (found.shape, found.dtype) == (torch.Size(shape), torch.float64)
            assert bool(torch.isfinite(found).all())
