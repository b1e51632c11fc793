import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import FedcoreError
from fedcore.training.partitions import Partition, assign_like, partition


def _check(split: Partition, labels: np.ndarray, min_examples: int) -> None:
    together = np.concatenate(split.indices)
    assert np.array_equal(np.sort(together), np.arange(labels.size))
    for part, counts in zip(split.indices, split.class_counts, strict=True):
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
        assert part.size >= min_examples
        assert np.array_equal(np.bincount(labels[part], minlength=counts.size), counts)
        with pytest.raises(ValueError, match="read-only"):
            part[:] = 0


@given(
    sizes=st.lists(st.integers(5, 40), min_size=1, max_size=6),
    clients=st.integers(1, 5),
    kind=st.sampled_from(["iid", "dirichlet", "by_label"]),
    alpha=st.sampled_from([0.3, 1.0, 100.0]),
    wanted=st.integers(1, 6),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=150, deadline=None)
def test_every_kind_covers_disjointly_and_deterministically(
    sizes, clients, kind, alpha, wanted, seed
) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    each = min(wanted, len(sizes))
    if kind == "by_label" and clients * each < len(sizes):
        clients = -(-len(sizes) // each)
    options = {"alpha": alpha, "labels_per_client": each, "seed": seed}
    split = partition(labels, clients, kind, **options)
    _check(split, labels, 1)
    again = partition(labels.tolist(), clients, kind, **options)
    assert all(map(np.array_equal, split.indices, again.indices))
    if kind == "by_label":
        holders = (split.class_counts > 0).sum(axis=0)
        assert ((split.class_counts > 0).sum(axis=1) == each).all()
        assert holders.max() - holders.min() <= 1
        for counts in split.class_counts.T:
            assert np.ptp(counts[counts > 0]) <= 1
    if kind == "iid":
        assert np.ptp(split.sizes) <= 1


def test_seeds_and_kinds_give_different_partitions() -> None:
    labels = np.repeat(np.arange(5), 40)
    for kind in ("iid", "dirichlet", "by_label"):
        a, b = (partition(labels, 4, kind, seed=seed) for seed in (0, 1))
        assert not all(map(np.array_equal, a.indices, b.indices))


def test_alpha_goes_from_one_owner_a_class_to_equal_shares() -> None:
    labels = np.repeat(np.arange(40), 500)
    equal = partition(labels, 5, "dirichlet", alpha=1e6, seed=0).class_counts
    assert np.abs(equal - 100).max() <= 3
    single = partition(labels, 5, "dirichlet", alpha=1e-3, seed=0).class_counts
    assert (single.max(axis=0) / 500).mean() > 0.99


def test_dirichlet_shares_have_the_moments_of_the_distribution() -> None:
    # Shares of a symmetric Dirichlet over N clients: mean 1/N, variance (1/N)(1-1/N)/(N alpha + 1).
    labels = np.repeat(np.arange(400), 1000)
    shares = partition(labels, 4, "dirichlet", alpha=0.5, seed=0).class_counts / 1000
    assert shares.mean(axis=1) == pytest.approx(np.full(4, 0.25), abs=0.05)
    assert shares.var() == pytest.approx(0.25 * 0.75 / 3, rel=0.1)


def test_min_examples_is_reached_by_drawing_again() -> None:
    labels = np.repeat(np.arange(3), 60)
    loose = [partition(labels, 6, "dirichlet", alpha=0.3, seed=s).sizes.min() for s in range(20)]
    assert min(loose) < 15
    for seed in range(20):
        split = partition(labels, 6, "dirichlet", alpha=0.3, seed=seed, min_examples=15)
        _check(split, labels, 15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "dirichlt"}, r"unknown partition 'dirichlt'; did you mean dirichlet\?"),
        ({"clients": 0}, "clients is 0; it must be at least 1"),
        ({"min_examples": 0}, "min_examples is 0; it must be at least 1"),
        ({"min_examples": 8}, "30 examples cannot give 4 clients min_examples=8 each"),
        ({"kind": "dirichlet", "alpha": 0.0}, "alpha is 0.0; it must be positive and finite"),
        ({"kind": "dirichlet", "alpha": float("nan")}, "alpha is nan"),
        ({"kind": "by_label", "labels_per_client": 4}, "labels_per_client is 4; .* 1 and 3"),
        (
            {"kind": "by_label", "clients": 2, "labels_per_client": 1},
            "2 clients with 1 labels each cannot cover 3 classes",
        ),
        (
            {"kind": "by_label", "clients": 30, "labels_per_client": 2},
            "class 0 has 10 examples for 20 clients",
        ),
        (
            {"kind": "dirichlet", "alpha": 0.01, "min_examples": 7},
            r"no dirichlet partition with alpha=0\.01 in 1000 draws .*min_examples=7; at best",
        ),
        ({"labels": [0.5]}, "labels has shape .* type float64"),
        ({"labels": [[1]]}, r"labels has shape \(1, 1\)"),
        ({"labels": []}, r"labels has shape \(0,\)"),
        ({"labels": [0, -1]}, "labels holds -1; classes are counted from 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    defaults = {"labels": np.repeat(np.arange(3), 10), "clients": 4}
    with pytest.raises(FedcoreError, match=message):
        partition(**{**defaults, **arguments})


@given(seed=st.integers(0, 10_000), clients=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_held_out_examples_follow_the_clients_own_classes(seed: int, clients: int) -> None:
    rng = np.random.default_rng(seed)
    train = np.repeat(np.arange(4), 50)
    test = rng.integers(0, 4, size=37)
    reference = partition(train, clients, "dirichlet", alpha=0.5, seed=seed)
    spread = assign_like(reference, test, seed)
    _check(spread, test, 0)
    totals = np.bincount(test, minlength=4)
    exact = reference.class_counts * (totals / reference.class_counts.sum(axis=0))
    assert np.abs(spread.class_counts - exact).max() < 1
    again = assign_like(reference, test, seed)
    assert all(map(np.array_equal, spread.indices, again.indices))


def test_a_client_gets_no_held_out_example_of_a_class_it_lacks() -> None:
    reference = partition(np.repeat(np.arange(6), 20), 6, "by_label", labels_per_client=2)
    spread = assign_like(reference, np.repeat(np.arange(6), 7), seed=0)
    assert (spread.class_counts[reference.class_counts == 0] == 0).all()


def test_ties_of_rare_classes_do_not_all_go_to_one_client() -> None:
    reference = partition(np.zeros(100, dtype=int), 4, "iid")
    winners = {int(assign_like(reference, [0], seed).sizes.argmax()) for seed in range(40)}
    assert winners == {0, 1, 2, 3}


def test_a_class_that_no_client_holds_is_named() -> None:
    reference = partition([0, 0, 2, 2], 2, "iid")
    for label in (1, 3):
        with pytest.raises(FedcoreError, match=f"labels_test holds class {label}"):
            assign_like(reference, [0, label], seed=0)
