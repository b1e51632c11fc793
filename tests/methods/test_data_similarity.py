from itertools import permutations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import FedcoreError, MissingExtraError
from fedcore.methods.tri.ce_lora.class_mixtures import (
    check_comparable,
    fit_class_mixtures,
    read_class_mixtures,
)
from fedcore.methods.tri.ce_lora.optimal_transport import transport_costs
from fedcore.methods.tri.ce_lora.similarity import (
    client_distances,
    component_distances,
    data_similarity,
    group_distances,
)
from tests.property.mixtures import random_statistics, reordered

SEEDS = st.integers(0, 2**31)


def mixtures(*told):
    return [read_class_mixtures(statement, f"c{n}") for n, statement in enumerate(told)]


def squared(*told):
    return client_distances(mixtures(*told))


def dense_definition(told):
    """``D^2`` by the definition: a loop of exact programs over all pairs of classes and clients."""
    clients = mixtures(*told)
    parts = []
    for client in clients:
        ends = np.cumsum(client.sizes)
        parts.append([slice(e - s, e) for e, s in zip(ends, client.sizes, strict=True)])
    found = np.zeros((len(clients), len(clients)))
    for i, one in enumerate(clients):
        for j, other in enumerate(clients):
            between = np.zeros((len(parts[i]), len(parts[j])))
            for c, here in enumerate(parts[i]):
                for d, there in enumerate(parts[j]):
                    costs = ot.dist(one.means[here], other.means[there])
                    costs += ot.dist(one.deviations[here], other.deviations[there])
                    between[c, d] = ot.emd2(one.weights[here], other.weights[there], costs)
            found[i, j] = ot.emd2(one.shares, other.shares, between)
    return found


@given(st.integers(1, 5), st.integers(1, 5), SEEDS, st.sampled_from(["smooth", "ties", "sparse"]))
def test_transport_is_that_of_pot(m, n, seed, kind):
    random = np.random.default_rng(seed)
    first, second = random.dirichlet(np.ones(m), 12), random.dirichlet(np.ones(n), 12)
    costs = random.random((12, m, n)) * 10.0 ** random.integers(-6, 7)
    if kind == "ties":
        costs = random.integers(0, 3, (12, m, n)).astype(float)
        first, second = np.full((12, m), 1 / m), np.full((12, n), 1 / n)
    if kind == "sparse":
        # All mass on the leading atoms; the others cost more than their distance could.
        first[:, 1:], first[:, 0] = 0, 1
        costs[:, 1:] = 1e9
    found = transport_costs(first, second, costs)
    expected = [ot.emd2(a, b, c) for a, b, c in zip(first, second, costs, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14 * costs.max())
    assert (found >= 0).all()


@given(SEEDS)
def test_atoms_without_mass_change_nothing(seed):
    random = np.random.default_rng(seed)
    first, second = random.dirichlet(np.ones(2), 6), random.dirichlet(np.ones(3), 6)
    costs = random.random((6, 2, 3))
    expected = transport_costs(first, second, costs)
    for extra in (1, 4):
        wide = np.pad(first, [(0, 0), (0, extra)]), np.pad(second, [(0, 0), (0, extra)])
        padded = np.pad(costs, [(0, 0), (0, extra), (0, extra)], constant_values=7.0)
        np.testing.assert_allclose(transport_costs(*wide, padded), expected, atol=1e-14)


def test_a_large_batch_is_its_parts():
    random = np.random.default_rng(0)
    first, second = random.dirichlet(np.ones(3), 5000), random.dirichlet(np.ones(3), 5000)
    costs = random.random((5000, 3, 3))
    whole = transport_costs(first, second, costs)
    for n in (0, 2047, 2048, 4999):
        part = transport_costs(first[n : n + 1], second[n : n + 1], costs[n : n + 1])
        assert part[0] == whole[n]
    assert len(transport_costs(first[:0], second[:0], costs[:0])) == 0


def test_a_solver_that_does_not_finish_is_an_error(monkeypatch):
    square = np.full((1, 4), 0.25), np.full((1, 4), 0.25), np.ones((1, 4, 4))
    assert transport_costs(*square) == pytest.approx(1.0)
    monkeypatch.setattr(ot, "emd2", lambda *args, **named: [0.0, {"warning": "numItermax"}])
    with pytest.raises(FedcoreError, match="transport between 4 x 4 atoms: numItermax"):
        transport_costs(*square)
    monkeypatch.setitem(__import__("sys").modules, "ot", None)
    with pytest.raises(MissingExtraError, match=r"POT .* pip install 'fedcore-lora\[run\]'"):
        transport_costs(*square)


def test_components_are_at_the_bures_wasserstein_distance():
    """Against the matrix formula, which knows nothing of diagonal covariances."""
    random = torch.Generator().manual_seed(0)
    means = torch.randn(4, 3, generator=random, dtype=torch.float64)
    variances = torch.rand(4, 3, generator=random, dtype=torch.float64) + 0.1
    found = component_distances(means.numpy(), variances.sqrt().numpy())
    for i in range(4):
        for j in range(4):
            p, q = variances[i].diag(), variances[j].diag()
            cross = torch.linalg.svdvals(p.sqrt() @ q.sqrt()).sum()
            expected = (means[i] - means[j]).square().sum() + p.trace() + q.trace() - 2 * cross
            assert found[i, j] == pytest.approx(float(expected), abs=1e-12)


def test_near_components_do_not_cancel():
    random = np.random.default_rng(0)
    means, spread = 1e3 * random.normal(size=(3, 8)), random.random((3, 8)) + 1
    step = 1e-4 * random.normal(size=(3, 8))
    both = np.concatenate([means, means + step, means]), np.concatenate([spread] * 3)
    found = component_distances(*both)
    moved = np.square(both[0][:3] - both[0][3:6]).sum(1)
    np.testing.assert_allclose(found[range(3), range(3, 6)], moved, rtol=1e-12)
    assert (found[range(3), range(6, 9)] == 0).all()
    assert (found == found.T).all()
    assert (found >= 0).all()


def test_single_gaussians_are_at_their_own_distance():
    told = [random_statistics(n, classes=1, components=1, features=7) for n in range(3)]
    found = squared(*told)
    for i in range(3):
        for j in range(3):
            gap = (told[i]["means"] - told[j]["means"]).square().sum()
            gap += (told[i]["variances"].sqrt() - told[j]["variances"].sqrt()).square().sum()
            assert found[i, j] == pytest.approx(float(gap), abs=1e-12)


@settings(max_examples=25)
@given(SEEDS, st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_it_is_the_definition(seed, classes, components, counts):
    sizes = {"classes": classes, "components": components, "counts": counts}
    told = [
        random_statistics(seed, **sizes),
        random_statistics(seed + 1, **sizes),
        random_statistics(seed + 2, classes=2, components=1),
        random_statistics(seed + 3, classes=5, components=2, counts=False),
    ]
    found = squared(*told)
    np.testing.assert_allclose(found, dense_definition(told), rtol=1e-10, atol=1e-10)


@given(SEEDS)
def test_the_distance_is_a_metric(seed):
    told = [random_statistics(seed + n, classes=1 + n, components=1 + n % 3) for n in range(5)]
    distances = np.sqrt(squared(*told))
    assert (distances == distances.T).all()
    assert (distances.diagonal() == 0).all()
    for i, j, k in permutations(range(5), 3):
        assert distances[i, k] <= distances[i, j] + distances[j, k] + 1e-9


@given(SEEDS, st.permutations(range(4)), st.permutations(range(3)))
def test_the_order_of_classes_and_components_does_not_matter(seed, classes, components):
    told = random_statistics(seed)
    assert squared(told, reordered(told, classes, components))[0, 1] < 1e-12
    other = random_statistics(seed + 1)
    found = squared(told, reordered(other, classes, components))[0, 1]
    assert found == pytest.approx(squared(told, other)[0, 1], abs=1e-9)


@given(SEEDS, st.floats(0.1, 30))
def test_translations_coordinates_and_scale(seed, factor):
    told = [random_statistics(seed + n, classes=4 + n % 2) for n in range(4)]
    base = squared(*told)
    moved = [{**t, "means": t["means"] + 17.0} for t in told]
    np.testing.assert_allclose(squared(*moved), base, rtol=1e-9)
    turned = [{**t, "means": t["means"].flip(1), "variances": t["variances"].flip(1)} for t in told]
    np.testing.assert_allclose(squared(*turned), base, rtol=1e-9)
    scaled = [
        {**t, "means": factor * t["means"], "variances": factor**2 * t["variances"]} for t in told
    ]
    np.testing.assert_allclose(squared(*scaled), factor**2 * base, rtol=1e-9)
    # And the similarity does not know the scale of the features.
    np.testing.assert_allclose(data_similarity(squared(*scaled)), data_similarity(base), rtol=1e-9)


def test_similarity_is_one_at_zero_and_one_over_e_at_the_median():
    distances = np.array([[0.0, 1.0, 2.0], [1.0, 0.0, 5.0], [2.0, 5.0, 0.0]])
    found = data_similarity(distances)
    assert (found.diagonal() == 1).all()
    np.testing.assert_allclose(found[0, 1:], np.exp([-0.5, -1.0]), rtol=1e-15)
    np.testing.assert_allclose(found[1, 2], np.exp(-2.5), rtol=1e-15)
    assert (data_similarity(np.zeros((3, 3))) == 1).all()
    assert data_similarity(np.zeros((1, 1))) == 1
    # Most pairs equal: the scale falls back to 1, and nothing is divided by zero.
    far = np.zeros((4, 4))
    far[3, :3] = far[:3, 3] = 2.0
    far[0, 1] = far[1, 0] = 0.0
    assert np.isfinite(data_similarity(far)).all()


def test_groups_of_different_sizes():
    costs = np.abs(np.subtract.outer(np.arange(6.0), np.arange(6.0)))
    masses = np.array([1.0, 0.5, 0.5, 0.2, 0.3, 0.5])
    found = group_distances(costs, masses, np.array([1, 2, 3]))
    expected = [[0, 1.5, 4.3], [1.5, 0, 2.8], [4.3, 2.8, 0]]
    np.testing.assert_allclose(found, expected, atol=1e-14)


def blobs(sizes, features=6, seed=0):
    """Features and labels of classes 10, 20, ... with the given numbers of examples."""
    random = torch.Generator().manual_seed(seed)
    parts = [5 * c + torch.randn(n, features, generator=random) for c, n in enumerate(sizes)]
    labels = torch.tensor([10 * (c + 1) for c, n in enumerate(sizes) for _ in range(n)])
    order = torch.randperm(len(labels), generator=random)
    return torch.cat(parts)[order], labels[order]


def clumps(sizes, features=6, seed=0):
    """A class for every entry of ``sizes``, of clumps far apart with those numbers of examples."""
    random = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(n, features, generator=random) + 50 * k * torch.eye(features)[c % features]
        for c, own in enumerate(sizes)
        for k, n in enumerate(own)
    ]
    labels = torch.tensor([10 * (c + 1) for c, own in enumerate(sizes) for _ in range(sum(own))])
    return torch.cat(parts), labels


def test_a_class_gets_one_component_for_every_ten_examples_up_to_three():
    features, labels = clumps([[9], [10], [19], [10, 10], [15, 14], [10, 10, 10], [40, 30, 30]])
    told = fit_class_mixtures(features, labels, 0, 10, share_counts=True)
    # The first class is too small, and the numbers of the others do not tell their labels.
    assert torch.bincount(told["classes"]).tolist() == [1, 1, 2, 2, 3, 3]
    assert told["counts"].tolist() == [10, 19, 20, 29, 30, 100]
    assert told["means"].shape == told["variances"].shape == (12, 6)
    # G (1 + 2 D) numbers travel, for the components alone.
    assert sum(told[n].numel() for n in ("weights", "means", "variances")) == 12 * 13
    assert {told[n].dtype for n in ("weights", "means", "variances")} == {torch.float32}
    first = features[labels == 20].double()
    torch.testing.assert_close(told["means"][0].double(), first.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        told["variances"][0].double(), first.var(0, correction=0) + 1e-5, rtol=1e-5, atol=1e-6
    )
    assert "counts" not in fit_class_mixtures(features, labels, 0, 10)
    read_class_mixtures(told, "c0")


def test_fits_follow_the_seed_and_not_the_order_of_examples():
    features, labels = blobs([40, 40])
    one, again = (fit_class_mixtures(features, labels, 2**62 + 1, 10) for _ in range(2))
    for name, tensor in one.items():
        assert torch.equal(tensor, again[name])
    # Classes fall apart into two halves each: any start finds them.
    halves = torch.cat([features, features + 100])
    twice = torch.cat([labels, labels])
    order = torch.randperm(160, generator=torch.Generator().manual_seed(1))
    found = [
        read_class_mixtures(fit_class_mixtures(f, k, 3, 40), "c")
        for f, k in ((halves, twice), (halves[order], twice[order]))
    ]
    assert client_distances(found)[0, 1] < 1e-6
    assert list(found[0].sizes) == [2, 2]


def test_a_fit_is_computed_on_one_thread_whatever_the_process_has(monkeypatch):
    """On several, sums are added in the order in which threads finish: two fits may differ."""
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_info, threadpool_limits

    def openmp():
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "openmp"}

    computed, fit = [], GaussianMixture.fit

    def watched(mixture, points):
        computed.append(openmp())
        return fit(mixture, points)

    monkeypatch.setattr(GaussianMixture, "fit", watched)
    with threadpool_limits(2, user_api="openmp"):
        fit_class_mixtures(*blobs([40]), 0, 10)
        assert openmp() == {2}
    assert computed
    assert all(threads == {1} for threads in computed)


def test_statistics_that_are_the_data_are_not_released():
    """A three-component fit to three examples is those examples (as the authors' rule allows)."""
    features, labels = blobs([3], features=4)
    told = fit_class_mixtures(features, labels, 42, 1)
    nearest = torch.cdist(features, told["means"]).min(1).values
    assert float(nearest.max()) < 1e-6
    torch.testing.assert_close(told["variances"], torch.full((3, 4), 1e-5), rtol=1e-3, atol=0)
    assert fit_class_mixtures(features, labels, 42, 10) == {}


@given(
    features=st.integers(1, 4),
    size=st.integers(1, 60),
    least=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_every_component_rests_on_enough_examples(features, size, least, seed):
    points, labels = blobs([size], features, seed)
    told = fit_class_mixtures(points, labels, seed, least)
    if size < least:
        assert told == {}
        return
    assert 1 <= len(told["weights"]) <= min(3, size // least)
    assert float(told["weights"].min()) * size >= least * (1 - 1e-5)


def test_an_example_far_from_its_class_is_not_told():
    features, labels = clumps([[29, 1], [1]])
    told = fit_class_mixtures(features, labels, 0, 10)
    assert float(torch.cdist(told["means"], features[29:30]).min()) > 1
    # Asked to, it is, and a class of one example is that example.
    told = fit_class_mixtures(features, labels, 0, 1)
    assert float(torch.cdist(told["means"], features[29:30]).min()) < 1e-4
    torch.testing.assert_close(told["means"][-1], features[30], rtol=0, atol=1e-6)
    torch.testing.assert_close(told["variances"][-1], torch.full((6,), 1e-5), rtol=1e-6, atol=0)


def test_disjoint_labels_have_a_finite_distance():
    features, labels = blobs([30, 30])
    first, second = labels == 10, labels == 20
    told = [fit_class_mixtures(features[k], labels[k], 0, 10) for k in (first, second)]
    assert 0 < squared(*told)[0, 1] < np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.tensor([0.5, 0.6, 1.0])}, "weights of a class that sum to 1.1, not to"),
        ({"weights": torch.tensor([1.5, -0.5, 1.0])}, "hold a mixture weight of -0.5"),
        ({"variances": torch.tensor([[1.0], [0.0], [1.0]])}, "hold a variance of 0; all must"),
        ({"variances": torch.tensor([[1.0], [-2.0], [1.0]])}, "hold a variance of -2"),
        ({"variances": torch.tensor([[1.0], [torch.inf], [1.0]])}, "hold a variance of"),
        ({"means": torch.tensor([[1.0], [torch.nan], [1.0]])}, "a mean that is not finite"),
        ({"means": torch.ones(3, 2)}, r"means \(3, 2\) and variances \(3, 1\)"),
        ({"means": torch.ones(0, 1), "variances": torch.ones(0, 1)}, r"means \(0, 1\)"),
        ({"weights": torch.ones(2)}, r"have 3 means, weights \(2,\)"),
        ({"classes": torch.tensor([0, 1])}, r"classes \(2,\)"),
        ({"classes": torch.tensor([1, 1, 2])}, r"classes \[1, 1, 2\]; number them 0, 1"),
        ({"classes": torch.tensor([0, 1, 0])}, r"number them 0, 1, ... in order"),
        ({"counts": torch.tensor([3])}, r"counts \[3.0\]; pass a positive one for each of 2"),
        ({"counts": torch.tensor([3, 0])}, r"counts \[3.0, 0.0\]"),
    ],
)
def test_malformed_statistics_are_refused(change, message):
    told = {
        "weights": torch.tensor([0.5, 0.5, 1.0]),
        "means": torch.zeros(3, 1),
        "variances": torch.ones(3, 1),
        "classes": torch.tensor([0, 0, 1]),
    }
    read_class_mixtures(told, "c7")
    with pytest.raises(FedcoreError, match=f"client c7: its statistics .*{message}"):
        read_class_mixtures({**told, **change}, "c7")
    for name in told:
        with pytest.raises(FedcoreError, match=f"client c7: its statistics lack '{name}'"):
            read_class_mixtures({k: v for k, v in told.items() if k != name}, "c7")


def test_what_rounding_did_to_the_sum_of_weights_is_divided_out():
    told = random_statistics(0, classes=2)
    told["weights"] = (told["weights"] * (1 + 3e-5)).float()
    found = read_class_mixtures(told, "c").weights
    assert found[:3].sum() == pytest.approx(1, abs=1e-15)
    assert found[3:].sum() == pytest.approx(1, abs=1e-15)


def test_features_of_other_encoders_are_refused():
    told = random_statistics(0)
    digest = torch.tensor([1, 2], dtype=torch.uint8)
    one = read_class_mixtures({**told, "encoder": digest}, "a")
    check_comparable({"a": one, "b": read_class_mixtures({**told, "encoder": digest}, "b")})
    for other in ({**told, "encoder": digest + 1}, told):
        with pytest.raises(FedcoreError, match=r"client b: .* another encoder .* client a"):
            check_comparable({"a": one, "b": read_class_mixtures(other, "b")})
    narrow = read_class_mixtures(random_statistics(0, features=4), "b")
    with pytest.raises(FedcoreError, match=r"client b: .* of 4 features, .* client a of 5"):
        check_comparable({"a": one, "b": narrow})


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.ones(3), torch.ones(3).long(), r"shape \(3,\); pass floats \(n, D\)"),
        (torch.ones(3, 2).long(), torch.ones(3).long(), "features are torch.int64"),
        (torch.ones(3, 2), torch.ones(2).long(), r"shape \(2,\); pass 3 integers"),
        (torch.ones(3, 2), torch.ones(3), "labels are torch.float32"),
        (torch.full((3, 2), torch.nan), torch.ones(3).long(), "not finite"),
    ],
)
def test_bad_examples_are_refused(features, labels, message):
    with pytest.raises(FedcoreError, match=message):
        fit_class_mixtures(features, labels, 0, 1)


def test_a_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.mixture", None)
    with pytest.raises(MissingExtraError, match=r"scikit-learn .*fedcore-lora\[run\]"):
        fit_class_mixtures(*blobs([10]), 0, 10)
