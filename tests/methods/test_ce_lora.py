from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import FedcoreError
from fedcore.methods import Broadcast, create_method
from fedcore.methods.tri.ce_lora.class_mixtures import read_class_mixtures
from fedcore.methods.tri.ce_lora.similarity import (
    cka_similarity,
    client_distances,
    cosine_similarity,
    data_similarity,
)
from tests.property.mixtures import random_statistics
from tests.property.tri_rounds import (
    core_round,
    near_identity,
    normal_row,
    tri_layout,
    tri_product,
)

ALONE = ("no client sent data statistics: mixed by similarity of the models alone",)
COUNTS = st.integers(1, 6)
SEEDS = st.integers(0, 2**31)


def method(**options):
    return create_method("ce_lora", **options)


def cores_of(cohort, rows):
    """``(N, L, r, r)`` of rows in the upload layout."""
    return cohort.layout.groups[0].view(rows)


def personal_cores(cohort, result):
    return cores_of(cohort, torch.stack([result.personal[c] for c in cohort.client_ids]))


def told_of(count, seed=0, **sizes):
    return {f"c{n:03d}": random_statistics(seed + n, **sizes) for n in range(count)}


@given(COUNTS, SEEDS, st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.05, 0.2, 3.0]))
def test_it_is_the_definition(count, seed, lam, temperature):
    cores = near_identity(count, seed=seed)
    weights = [1.0 + n for n in range(count)]
    cohort, previous = core_round(cores, weights, statistics=told_of(count, seed, classes=2))
    chosen = method(lam=lam, temperature=temperature)
    result = chosen.aggregate(cohort, previous)
    mixtures = [read_class_mixtures(cohort.statistics[c], c) for c in cohort.client_ids]
    data = torch.from_numpy(data_similarity(client_distances(mixtures)))
    model = cosine_similarity([cores - torch.eye(4, dtype=torch.float64)])
    similarity = lam * data + (1 - lam) * model
    expected = torch.softmax(similarity / temperature, dim=1)
    mixing = chosen.mixing(cohort, previous)
    torch.testing.assert_close(mixing.weights, expected, rtol=1e-11, atol=1e-13)
    assert mixing.flags == result.flags == ()
    # Rows are distributions, and a client that is most like itself is its own largest part.
    assert (mixing.weights >= 0).all()
    torch.testing.assert_close(mixing.weights.sum(1), torch.ones(count, dtype=torch.float64))
    assert (mixing.weights.diagonal() >= mixing.weights.amax(1) - 1e-15).all()
    # Linear at fixed weights.
    mixed = torch.einsum("ij,jlab->ilab", expected, cores)
    torch.testing.assert_close(personal_cores(cohort, result), mixed, rtol=1e-11, atol=1e-12)


@given(COUNTS, SEEDS, st.booleans())
def test_mixes_stay_in_the_hull_and_the_global_row_is_the_mean(count, seed, by_examples):
    cores = near_identity(count, seed=seed)
    weights = [1.0 + n for n in range(count)]
    cohort, previous = core_round(cores, weights, statistics=told_of(count, seed, classes=2))
    result = method(weight_by_examples=by_examples).aggregate(cohort, previous)
    mixed = personal_cores(cohort, result)
    assert (mixed <= cores.amax(0) + 1e-14).all()
    assert (mixed >= cores.amin(0) - 1e-14).all()
    mean = torch.einsum("n,nlab->lab", cohort.shares, cores)
    layout, changed = previous.layout, result.changed
    assert changed == cohort.layout
    torch.testing.assert_close(cores_of(cohort, layout.gather(result.row, changed)), mean)
    for slot in layout:
        if slot.factor != "R":
            untouched = layout.view(previous.row, slot)
            assert torch.equal(layout.view(result.row, slot), untouched)


def test_what_travels_is_the_core():
    layout = tri_layout()
    chosen = method()
    sent = chosen.upload_layout(layout, 2)
    assert [slot.name for slot in sent] == ["m0.R", "m1.R", "m2.R"]
    assert sent.numel == 3 * 16
    # The core that a client receives is a mix of its own, so it holds every tensor itself.
    assert chosen.private_layout(layout, 2) == layout
    assert chosen.plan(2).keeps == {"A", "B"}
    assert not chosen.plan(2).sends_dense
    assert len(chosen.frozen_layout(layout, 2)) == 0
    assert chosen.plan(0).trains == {"A", "B", "R"}
    assert chosen.adapter_options == {"init": "ce"}


def test_a_high_temperature_gives_the_mean_and_a_low_one_the_own_core():
    cores, weights = near_identity(4), [1.0, 2.0, 3.0, 10.0]
    cohort, previous = core_round(cores, weights, statistics=told_of(4))
    hot = method(temperature=1e9).aggregate(cohort, previous)
    torch.testing.assert_close(
        personal_cores(cohort, hot), cores.mean(0).expand_as(cores), rtol=1e-8, atol=1e-8
    )
    hot = method(temperature=1e9, weight_by_examples=True).aggregate(cohort, previous)
    mean = cores_of(cohort, previous.layout.gather(hot.row, cohort.layout))
    torch.testing.assert_close(
        personal_cores(cohort, hot), mean.expand_as(cores), rtol=1e-8, atol=1e-8
    )
    for low in (1e-4, 1e-300):
        cold = method(temperature=low).aggregate(cohort, previous)
        torch.testing.assert_close(personal_cores(cohort, cold), cores, rtol=1e-12, atol=1e-12)


def test_at_the_default_one_similarity_unit_is_a_factor_of_150():
    cores = near_identity(2)
    eye = torch.eye(4, dtype=torch.float64)
    cores[1] = 2 * eye - cores[0]
    cohort, previous = core_round(cores)
    weights = method().mixing(cohort, previous).weights
    assert float(weights[0, 0] / weights[0, 1]) == pytest.approx(np.exp(2 / 0.2), rel=1e-9)


def test_modules_of_several_ranks_are_one_similarity():
    layout = tri_layout(4, [("a", 6, 5), ("b", 6, 5)])
    mixed = type(layout).build(
        [(s.module, s.factor, s.rows, s.width) for s in layout.factor_slots if s.module == "a"]
        + [("b", "A", 2, 5), ("b", "B", 2, 6), ("b", "R", 2, 2)],
        [("head", (3, 5))],
    )
    previous = Broadcast(mixed, normal_row(mixed, 0))
    cohort, _ = core_round(near_identity(3))
    sent = mixed.select("R", dense=False)
    updates = torch.stack(
        [sent.gather(mixed.gather(normal_row(mixed, n), sent), sent) for n in range(3)]
    )
    cohort = replace(cohort, layout=sent, updates=updates, ranks=torch.tensor([[4, 2]] * 3))
    found = method(lam=0.0, reference="previous_mean").mixing(cohort, previous).weights
    moves = updates - mixed.gather(previous.row, sent)
    expected = cosine_similarity([group.view(moves) for group in sent.groups])
    torch.testing.assert_close(found, torch.softmax(expected / 0.2, 1))
    eyes = [torch.eye(group.rows, dtype=torch.float64) for group in sent.groups]
    moves = [g.view(updates) - eye for g, eye in zip(sent.groups, eyes, strict=True)]
    found = method(lam=0.0).mixing(cohort, previous).weights
    torch.testing.assert_close(found, torch.softmax(cosine_similarity(moves) / 0.2, 1))


def test_similarities_and_references_are_what_they_say():
    cores = near_identity(3)
    cohort, previous = core_round(cores)
    layout = previous.layout
    for slot in layout.factor_slots:
        if slot.factor == "R":
            layout.view(previous.row, slot).mul_(3.0)
    eye = torch.eye(4, dtype=torch.float64)
    for options, expected in (
        ({}, cosine_similarity([cores - eye])),
        ({"reference": "previous_mean"}, cosine_similarity([cores - 3 * eye])),
        ({"similarity": "cka"}, cka_similarity([cores])),
    ):
        found = method(lam=0.0, **options).mixing(cohort, previous)
        torch.testing.assert_close(found.weights, torch.softmax(expected / 0.2, 1))
        assert found.flags == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaled_rows_are_compared_with_the_scaled_identity(dtype):
    """Rows hold R times the client's scaling; a core that did not move must not look moved."""
    cores = near_identity(3, modules=1).to(dtype)
    cores[2] = torch.eye(4)
    cohort, previous = core_round(cores)
    base = method(lam=0.0).mixing(cohort, previous).weights
    scales = torch.tensor([[1.3], [0.7], [1.1]], dtype=torch.float64)
    scaled = replace(cohort, updates=cohort.updates * scales.to(dtype), scalings=scales)
    found = method(lam=0.0).mixing(scaled, previous).weights
    torch.testing.assert_close(found, base, rtol=1e-5, atol=1e-7)
    assert float(found[2, 0]) == pytest.approx(float(found[2, 1]), rel=1e-12)


def test_without_statistics_models_decide_and_the_round_is_flagged_once():
    cores = near_identity(4)
    cohort, previous = core_round(cores)
    found = method().mixing(cohort, previous)
    assert found.flags == ALONE
    expected = method(lam=0.0).mixing(cohort, previous)
    assert torch.equal(found.weights, expected.weights)
    assert expected.flags == ()
    assert method().aggregate(cohort, previous).flags == ALONE
    # An empty statement, of a client whose classes are too small, is none.
    empty = replace(cohort, statistics={c: {} for c in cohort.client_ids})
    assert method().mixing(empty, previous).flags == ALONE


def test_clients_without_statistics_are_compared_by_their_models():
    cores, told = near_identity(4), told_of(4)
    whole, previous = core_round(cores, statistics=told)
    told.pop("c001")
    part = replace(whole, statistics=told)
    found = method(lam=1.0).mixing(part, previous)
    assert found.flags == (
        "1 of 4 clients sent no data statistics, first c001: "
        "compared by similarity of the models alone",
    )
    mixtures = [read_class_mixtures(told[c], c) for c in ("c000", "c002", "c003")]
    model = cosine_similarity([cores - torch.eye(4, dtype=torch.float64)])
    places = torch.tensor([0, 2, 3])
    data = torch.from_numpy(data_similarity(client_distances(mixtures)))
    model[places[:, None], places] = data
    torch.testing.assert_close(found.weights, torch.softmax(model / 0.2, 1))


def test_only_participants_count():
    cores, told = near_identity(3), told_of(6)
    cohort, previous = core_round(cores, statistics=told)
    few = replace(cohort, statistics={c: told[c] for c in cohort.client_ids})
    one, other = (method().mixing(c, previous).weights for c in (cohort, few))
    assert torch.equal(one, other)
    assert one.shape == (3, 3)


def test_clients_without_a_class_in_common_still_mix():
    random = torch.Generator().manual_seed(0)
    chosen, told = method(), {}
    for n in range(3):
        features = n + torch.randn(40, 6, generator=random)
        labels = torch.full((40,), n)
        told[f"c{n:03d}"] = chosen.statistics(features, labels, seed=n)
    cohort, previous = core_round(near_identity(3), statistics=told)
    found = chosen.mixing(cohort, previous)
    assert found.weights.isfinite().all()
    assert found.flags == ()
    similar = method(lam=1.0).mixing(cohort, previous).weights
    # The client in the middle of the features is nearer to both than they are to each other.
    assert similar[0, 1] > similar[0, 2]
    assert similar[2, 1] > similar[2, 0]


def test_statistics_are_told_once_and_only_of_large_classes():
    features = torch.randn(25, 6, generator=torch.Generator().manual_seed(0))
    features[:10] += 50
    labels = torch.tensor([3] * 20 + [8] * 5)
    told = method().statistics(features, labels, seed=7)
    assert sorted(told) == ["classes", "means", "variances", "weights"]
    assert told["classes"].tolist() == [0, 0]
    shared = method(share_counts=True).statistics(features, labels, seed=7)
    assert shared["counts"].tolist() == [20]
    assert torch.equal(told["means"], shared["means"])
    assert method(min_per_component=30).statistics(features, labels, seed=7) == {}
    assert method().capabilities.wants_features


def test_private_bases_make_the_mean_depend_on_the_gauge():
    """What the exactness trait says: common bases are exact, private ones are not."""
    random = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    layout = tri_layout(4, [("m", 64, 64)])
    slots = {factor: layout.by_name[f"m.{factor}"] for factor in "ABR"}
    common = torch.zeros(layout.size, dtype=torch.float64)
    for factor in "AB":
        layout.view(common, slots[factor]).copy_(noise(4, 64) / 8)
    hot = method(temperature=1e12)

    def error(rows):
        """Of the clients' models after the exchange against the mean of their models before."""
        target = sum(tri_product(layout, row, "m") for row in rows) / len(rows)
        cores = torch.stack([layout.view(row, slots["R"]) for row in rows])[:, None]
        cohort, previous = core_round(cores)
        mixed = personal_cores(cohort, hot.aggregate(cohort, previous))[:, 0]
        total = 0.0
        for row, core in zip(rows, mixed, strict=True):
            own = row.clone()
            layout.view(own, slots["R"]).copy_(core)
            total += float((tri_product(layout, own, "m") - target).norm() / target.norm())
        return total / len(rows)

    errors = []
    for drift in (0.0, 0.1, 0.3, 1.0):
        rows = common.repeat(6, 1)
        for row in rows:
            for factor in "AB":
                layout.view(row, slots[factor]).add_(drift * noise(4, 64) / 8)
            layout.view(row, slots["R"]).copy_(torch.eye(4) + 0.3 * noise(4, 4))
        errors.append(error(rows))
        turned = rows.clone()
        for row in turned:
            x, y = (torch.linalg.qr(noise(4, 4)).Q for _ in "xy")
            b, r, a = (layout.view(row, slots[f]) for f in "BRA")
            b.copy_(x.T @ b)
            r.copy_(x.T @ r @ y)
            a.copy_(y.T @ a)
        products = [tri_product(layout, row, "m") for row in rows]
        for row, product in zip(turned, products, strict=True):
            torch.testing.assert_close(tri_product(layout, row, "m"), product)
        assert error(turned) > 0.8
    assert errors[0] < 1e-11
    assert errors[1] == pytest.approx(0.13, abs=0.03)
    assert errors[2] == pytest.approx(0.39, abs=0.08)
    assert errors[3] == pytest.approx(1.29, abs=0.35)


def test_cores_that_did_not_move_or_are_zero_do_no_harm():
    still = torch.eye(4, dtype=torch.float64).repeat(3, 2, 1, 1)
    for cores in (still, 0 * still):
        cohort, previous = core_round(cores)
        for options in ({}, {"similarity": "cka"}, {"reference": "previous_mean"}):
            result = method(**options).aggregate(cohort, previous)
            torch.testing.assert_close(
                personal_cores(cohort, result), cores, rtol=1e-15, atol=1e-15
            )


def test_other_ranks_and_other_uploads_are_refused():
    cohort, previous = core_round(near_identity(2))
    cohort.ranks[1, 1] = 3
    with pytest.raises(FedcoreError, match=r"client c001 has rank 3 in m1.*ce_lora needs equal"):
        method().aggregate(cohort, previous)
    cohort, previous = core_round(near_identity(2))
    whole = previous.layout
    rows = torch.stack([normal_row(whole, n) for n in range(2)])
    with pytest.raises(FedcoreError, match=r"ce_lora needs exactly the core R .*; head is missing"):
        method().aggregate(replace(cohort, layout=whole, updates=rows), previous)
    only = whole.select("AR", dense=False)
    rows = whole.gather(rows, only)
    with pytest.raises(FedcoreError, match=r"ce_lora needs exactly the core R .*; m0\.A is"):
        method().aggregate(replace(cohort, layout=only, updates=rows), previous)


def test_statistics_that_cannot_be_compared_are_refused():
    told = told_of(3)
    told["c002"] = random_statistics(9, features=4)
    cohort, previous = core_round(near_identity(3), statistics=told)
    with pytest.raises(FedcoreError, match="client c002: its statistics are of 4 features"):
        method().aggregate(cohort, previous)
    told["c002"] = {**random_statistics(9), "encoder": torch.ones(8, dtype=torch.uint8)}
    with pytest.raises(FedcoreError, match=r"client c002: .* from another encoder"):
        method().aggregate(cohort, previous)
    told["c002"] = {**random_statistics(9), "variances": torch.zeros(12, 5)}
    with pytest.raises(FedcoreError, match="client c002: its statistics hold a variance of 0"):
        method().aggregate(cohort, previous)
    # Not read where they are not used.
    method(lam=0.0).aggregate(cohort, previous)
