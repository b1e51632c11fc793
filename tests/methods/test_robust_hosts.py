from __future__ import annotations

from dataclasses import replace
from math import nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.data.cohort import CohortBuilder
from fedcore.errors import FedcoreError
from fedcore.methods import METHODS, Broadcast, create_method
from fedcore.methods.robust.base import (
    RobustMethod,
    cohort_gram,
    distances,
    follow,
    norms,
    possible_hosts,
)
from fedcore_kernels.layout import FactorLayout
from tests.property.faulty_clients import clustered_round, regauged
from tests.property.lora_rounds import LoraRound, lora_rounds, make_lora_round, pick
from tests.reference.updates import update

RULES = [method.name for method in METHODS if issubclass(method, RobustMethod)]
HOSTS = ["fedit", "product_svd", "flora", "fedex", "florist", "lora_fair", "fedrot", "flora_na"]
KINDS = ("random", "near", "identical", "shared_a", "repeated_row", "mixed_ranks", "zero")


def whole(cohort, row):
    """The update of all modules as one vector."""
    return torch.cat([update(cohort.layout, row, m).flatten() for m in cohort.layout.modules])


def products(cohort):
    return torch.stack([whole(cohort, row) for row in cohort.updates])


@given(lora_rounds(kinds=KINDS, dtypes=(torch.float64, torch.float32, torch.bfloat16)))
def test_the_gram_and_the_distances_are_those_of_the_dense_products(case: LoraRound):
    dense = products(case.cohort)
    gram = cohort_gram(case.cohort)
    scale = float(dense.norm()) ** 2
    torch.testing.assert_close(gram, dense @ dense.T, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(norms(gram), dense.norm(dim=1), rtol=0, atol=1e-7 * scale**0.5)
    # Half of the digits cancel.
    expected = torch.cdist(dense, dense, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(distances(gram), expected, rtol=1e-6, atol=2e-7 * scale**0.5)


def test_many_modules_are_taken_some_at_a_time(monkeypatch):
    case = make_lora_round("random", [1.0] * 4, ((33, 7),) * 5, 3)
    expected = cohort_gram(case.cohort)
    monkeypatch.setattr("fedcore.methods.robust.base._GRAM_BYTES", 2 * 8 * 16)
    torch.testing.assert_close(cohort_gram(case.cohort), expected, rtol=1e-14, atol=0)


@given(st.integers(0, 2**31))
def test_equal_models_in_different_gauges_are_at_distance_zero(seed):
    case = make_lora_round("identical", [1.0] * 5, ((33, 7), (7, 33)), 3, seed)
    gaps = distances(cohort_gram(regauged(case.cohort, seed)))
    assert not gaps.any()
    apart = make_lora_round("near", [1.0] * 5, ((33, 7), (7, 33)), 3, seed)
    gaps = distances(cohort_gram(apart.cohort))
    assert bool((gaps + torch.eye(5) > 0).all())


@pytest.mark.parametrize("name", RULES)
@given(seed=st.integers(0, 2**31), faulty=st.sets(st.integers(0, 6), max_size=2))
def test_the_gauge_of_a_client_decides_nothing(name, seed, faulty):
    case = clustered_round(7, sorted(faulty), seed=seed, scale=-2.0)
    method = create_method(name)
    one = method.aggregate(case.cohort, case.previous)
    other = method.aggregate(regauged(case.cohort, seed + 1), case.previous)
    names = [[flag.split(":")[0] for flag in result.flags] for result in (one, other)]
    assert names[0] == names[1]
    gap = whole(case.cohort, one.row) - whole(case.cohort, other.row)
    assert float(gap.norm()) < 1e-6 * float(whole(case.cohort, one.row).norm())


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("host", HOSTS)
def test_clients_in_agreement_are_left_to_the_host(name, host):
    """Of equal models the host's result is the same, whoever is left out or counts less."""
    case = make_lora_round("identical", [1.0, 2.0, 0.5, 7.0, 1.0], ((33, 7), (7, 33)), 3)
    found = create_method(name, host=host).aggregate(case.cohort, case.previous)
    plain = create_method(host).aggregate(case.cohort, case.previous)
    one, other = (whole(case.cohort, result.row) for result in (found, plain))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert found.changed == plain.changed
    for module, (outer, inner) in found.residual.items():
        expected = plain.residual[module].outer.T @ plain.residual[module].inner
        torch.testing.assert_close(outer.T @ inner, expected)


@pytest.mark.parametrize(
    ("name", "options"), [("robust_clip", {"limit": 9.0}), ("robust_geomedian", {})]
)
def test_splitting_a_client_changes_nothing_where_weights_count(name, options):
    case = clustered_round(5, [1], weights=[2.0, 3.0, 1.0, 4.0, 2.5])
    method = create_method(name, **options)
    halves = pick(case.cohort, [0, 1, 1, 2, 3, 4], [2.0, 1.0, 2.0, 1.0, 4.0, 2.5])
    one, other = (
        whole(case.cohort, method.aggregate(cohort, case.previous).row)
        for cohort in (case.cohort, halves)
    )
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["robust_clip", "robust_median", "robust_geomedian"])
def test_one_client_or_two_keep_their_model(name):
    for clients in (1, 2):
        case = clustered_round(clients)
        found = create_method(name).aggregate(case.cohort, case.previous).row
        plain = create_method("product_svd").aggregate(case.cohort, case.previous).row
        torch.testing.assert_close(
            whole(case.cohort, found), whole(case.cohort, plain), rtol=1e-3, atol=1e-3
        )
    case = clustered_round(1)
    one = create_method(name, limit=1e9) if name == "robust_clip" else create_method(name)
    found = whole(case.cohort, one.aggregate(case.cohort, case.previous).row)
    torch.testing.assert_close(found, products(case.cohort)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", RULES)
def test_zero_uploads_stay_zero_and_low_precision_is_not_lost(name):
    case = make_lora_round("zero", [1.0] * 5, ((33, 7), (7, 33)), 3)
    row = create_method(name).aggregate(case.cohort, case.previous).row
    assert not whole(case.cohort, row).any()
    assert not row.isnan().any()
    wide = clustered_round(6, [2], scale=-5.0)
    target = whole(wide.cohort, create_method(name).aggregate(wide.cohort, wide.previous).row)
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        previous = Broadcast(wide.previous.layout, wide.previous.row.float())
        cohort = replace(wide.cohort, updates=wide.cohort.updates.to(dtype))
        found = create_method(name).aggregate(cohort, previous).row
        assert found.dtype == torch.float32
        assert float((whole(cohort, found) - target).norm()) < allowed * float(target.norm())


@pytest.mark.parametrize("name", RULES)
def test_modules_together_decide_for_the_whole_adapter(name):
    """A client that is faulty in one module alone is treated so in all of them."""
    case = clustered_round(7)
    layout, updates = case.cohort.layout, case.cohort.updates.clone()
    layout.view(updates, layout.by_name["m1.B"])[4] *= -20
    result = create_method(name).aggregate(case.with_updates(updates), case.previous)
    assert any(flag.startswith("c004: ") for flag in result.flags)
    head = layout.view(result.row, layout.by_name["head"])
    mean = layout.view(updates, layout.by_name["head"]).mean(0)
    if name == "robust_clip":
        torch.testing.assert_close(head, mean)
    else:
        others = layout.view(updates, layout.by_name["head"])[[0, 1, 2, 3, 5, 6]]
        assert float((head - mean).norm()) > 0
        if name != "robust_krum":
            assert float((head - others.mean(0)).norm()) < float((head - mean).norm())


@pytest.mark.parametrize("name", RULES)
def test_weights_beyond_the_cap_count_as_the_cap(name):
    weights = [1.0, 2.0, 1e9, 2.0, 1.0, 2.0]
    case = clustered_round(6, weights=weights)
    method = create_method(name, weight_cap=3.0)
    found = method.aggregate(case.cohort, case.previous)
    capped = pick(case.cohort, range(6), [min(w, 3.0) for w in weights])
    expected = create_method(name).aggregate(capped, case.previous)
    assert torch.equal(found.row, expected.row)
    assert found.flags == ("c002: its weight 1e+09 counts as 3", *expected.flags)
    uniform = create_method(name, weight_cap=0.5).aggregate(case.cohort, case.previous)
    plain = create_method(name).aggregate(pick(case.cohort, range(6), [0.5] * 6), case.previous)
    assert torch.equal(uniform.row, plain.row)


@pytest.mark.parametrize("name", RULES)
@given(seed=st.integers(0, 2**31), faulty=st.integers(0, 6))
def test_the_decision_is_of_the_gram_alone_and_any_part_of_the_cohort_can_follow_it(
    name, seed, faulty
):
    weights = [2.0, 3.0, 1.0, 4.0, 0.5, 1.0, 2.0]
    case = clustered_round(7, [faulty], seed=seed, weights=weights, scale=-5.0)
    cohort, method = case.cohort, create_method(name, weight_cap=3.5)
    decision = method.rule.decide(cohort.client_ids, cohort.weights, cohort_gram(cohort))
    assert {flag.split(":")[0] for flag in decision.flags} >= {"c003", f"c{faulty:03d}"}
    assert decision.weights.shape == (7,)
    left = follow(cohort, decision)
    kept = [n for n in range(7) if decision.kept[n]]
    assert left.client_ids == tuple(cohort.client_ids[n] for n in kept)
    assert torch.equal(left.weights, decision.weights[kept])
    scales = torch.ones(7).double() if decision.scales is None else decision.scales
    expected = scales[kept, None] * products(cohort)[kept]
    torch.testing.assert_close(products(left), expected, rtol=1e-12, atol=1e-12)
    for module in cohort.layout.modules:
        slots = [cohort.layout.by_name[f"{module}.{factor}"] for factor in "AB"]
        part = FactorLayout.build([(s.module, s.factor, s.rows, s.width) for s in slots])
        alone = follow(
            replace(cohort, layout=part, updates=cohort.layout.gather(cohort.updates, part)),
            decision,
        )
        assert torch.equal(alone.updates, left.layout.gather(left.updates, part))
    whole_round = method.aggregate(cohort, case.previous)
    host = create_method("product_svd").aggregate(left, case.previous)
    assert torch.equal(whole_round.row, host.row)
    assert whole_round.flags == (*decision.flags, *host.flags)


@pytest.mark.parametrize("name", RULES)
def test_an_update_whose_norm_overflows_is_left_out(name):
    """Its distances would be NaN, and no distance at all to any comparison."""
    case = clustered_round(6)
    layout, updates = case.cohort.layout, case.cohort.updates.clone()
    layout.view(updates, layout.by_name["m1.B"])[2] = 1e160
    method = create_method(name)
    found = method.aggregate(case.with_updates(updates), case.previous)
    others = pick(case.cohort, [0, 1, 3, 4, 5])
    ids = tuple(case.cohort.client_ids[n] for n in (0, 1, 3, 4, 5))
    expected = method.aggregate(replace(others, client_ids=ids), case.previous)
    one, other = (whole(case.cohort, result.row) for result in (found, expected))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9 * float(other.norm()))
    assert found.flags == (
        "c002: left out, the norm of its update overflows",
        *expected.flags,
    )
    layout.view(updates, layout.by_name["m1.B"]).fill_(1e160)
    with pytest.raises(FedcoreError, match=rf"round 1: {name}: the norm of every update overflows"):
        method.aggregate(case.with_updates(updates), case.previous)


def test_hosts_are_the_lora_methods_whose_clients_send_both_factors():
    assert sorted(host.name for host in possible_hosts()) == sorted(HOSTS)


@pytest.mark.parametrize("name", RULES)
def test_the_client_half_and_the_capabilities_are_the_host_s(name):
    for host in (create_method(host) for host in HOSTS):
        method = create_method(name, host=host.name)
        assert method.plan(3) == host.plan(3)
        # Of a host that could align, the default options do not.
        assert not getattr(host, "align", False)
        history = host.capabilities.history
        assert method.capabilities == replace(
            host.capabilities,
            always_exact=False,
            linear=False,
            history="none" if history == "alignment" else history,
        )
        assert method.description.privacy_note == host.description.privacy_note
        assert method.rule is method
        assert host.rule is None
    assert create_method(name).capabilities.history == "none"
    assert create_method(name, host="fedrot").capabilities.history == "rounds"
    assert create_method(name, host="FlexLoRA").inner() == create_method("product_svd")
    case = clustered_round(5)
    row, layout = case.cohort.updates[0], case.cohort.layout
    turned = create_method(name, host="fedrot").prepare_upload(row, layout, case.previous, 3).row
    expected = create_method("fedrot").prepare_upload(row, layout, case.previous, 3).row
    assert torch.equal(turned, expected)
    assert not torch.equal(turned, row)
    lower = create_method(name).for_client(case.previous, case.previous, [1, 2, 3])
    best = create_method("product_svd").for_client(case.previous, case.previous, [1, 2, 3])
    assert torch.equal(lower, best)


@pytest.mark.parametrize("name", RULES)
def test_bad_cohorts_are_refused_before_anything_is_judged(name):
    mixed = make_lora_round("mixed_ranks", [1.0] * 5, ((33, 7), (7, 33)), 3)
    create_method(name).aggregate(mixed.cohort, mixed.previous)
    with pytest.raises(FedcoreError, match="fedit needs equal ranks"):
        create_method(name, host="fedit").aggregate(mixed.cohort, mixed.previous)
    # Also where the rule would have left out the one client of lower rank.
    case = clustered_round(5, [2], scale=-50.0)
    ranks = case.cohort.ranks.clone()
    ranks[2] = 1
    with pytest.raises(FedcoreError, match=r"client c002 has rank 1 in m0.* fedit needs equal"):
        create_method(name, host="fedit").aggregate(
            replace(case.cohort, ranks=ranks), case.previous
        )
    case = clustered_round(5)
    part = case.cohort.layout.select("A")
    lacking = replace(
        case.cohort, layout=part, updates=case.cohort.layout.gather(case.cohort.updates, part)
    )
    with pytest.raises(
        FedcoreError, match=rf"{name} needs every trained tensor .* m0\.B is missing"
    ):
        create_method(name).aggregate(lacking, case.previous)
    empty = pick(case.cohort, [])
    kept = create_method(name).aggregate(empty, case.previous)
    assert torch.equal(kept.row, case.previous.row)
    assert kept.flags == ("no valid upload: the global state is kept",)


def test_a_client_that_is_not_finite_never_reaches_a_rule():
    layout = FactorLayout.build([("m", "A", 2, 8), ("m", "B", 2, 8)])
    builder = CohortBuilder(layout, ["a", "b"], round=0)
    builder.row("a").fill_(1.0)
    builder.row("b").fill_(nan)
    for client in "ab":
        builder.receive(client, 1.0)
    with pytest.raises(FedcoreError, match=r"client b: m\.A holds 16 values that are not finite"):
        builder.finish()
