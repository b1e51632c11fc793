"""Robust rules over adapters on disk: one decision, whatever the groups of modules."""

import pytest
import torch

from fedcore import FedcoreError, aggregate
from fedcore.data.cohort import Cohort
from fedcore.methods import Broadcast, create_method
from tests.property.folders import MODULES, lora_folder, write_folder
from tests.reference.merged import (
    config_of,
    folder_products,
    mean_products,
    products,
    stored_tensors,
)
from tests.reference.updates import update

RULES = ("robust_clip", "robust_krum", "robust_median", "robust_geomedian")
WEIGHTS = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 1.0, "e": 9.0}


def near(folder, common, seed, *, sign=1.0, **options):
    """An adapter a tenth from ``common``; ``sign`` is of its update, the head follows."""
    own = stored_tensors(lora_folder(folder, seed, head=True, dtype=torch.float64, **options))
    tensors = {key: common[key] + 0.1 * tensor for key, tensor in own.items()}
    tensors = {
        key: tensor if "lora_A" in key or "magnitude" in key else sign * tensor
        for key, tensor in tensors.items()
    }
    return write_folder(folder, tensors, config_of(folder))


def cluster(home, **options):
    """Five adapters; the update of ``c`` is turned round and ten times as large."""
    common = stored_tensors(
        lora_folder(home / "common", 99, head=True, dtype=torch.float64, **options)
    )
    return {
        name: near(home / name, common, n, sign=-10.0 if name == "c" else 1.0, **options)
        for n, name in enumerate("abcde")
    }


@pytest.fixture
def five(tmp_path):
    return cluster(tmp_path)


@pytest.fixture
def mixed(tmp_path):
    """Ranks and scalings of their own."""
    return {
        name: lora_folder(
            tmp_path / name,
            n,
            2 + n % 3,
            head=True,
            dtype=torch.float64,
            lora_alpha=[4, 5, 60, 6, 7][n],
            use_rslora=n == 1,
        )
        for n, name in enumerate("abcde")
    }


@pytest.mark.parametrize("group_bytes", [1, 1 << 30])
@pytest.mark.parametrize("host", ["product_svd", "fedit", "flora", "fedex", "lora_fair"])
@pytest.mark.parametrize("rule", RULES)
def test_groups_of_any_size_give_the_result_on_the_whole_cohort(five, rule, host, group_bytes):
    compare(five, rule, {"host": host, "weight_cap": 4.0}, group_bytes)


@pytest.mark.parametrize("host", ["product_svd", "flora", "florist"])
@pytest.mark.parametrize("rule", RULES)
def test_mixed_ranks_and_scalings_are_judged_by_their_products(mixed, rule, host):
    compare(mixed, rule, {"host": host}, group_bytes=1)


def compare(folders, rule, options, group_bytes):
    """Adapters on disk beside the same rule on all modules of all adapters at once."""
    found = aggregate(folders, WEIGHTS, method=rule, options=options, group_bytes=group_bytes)
    cohort, method = Cohort.from_folders(folders, WEIGHTS), create_method(rule, **options)
    zero = torch.zeros(cohort.layout.size, dtype=cohort.updates.dtype)
    expected = method.aggregate(cohort, Broadcast(cohort.layout, zero))
    head = cohort.layout.view(expected.row, cohort.layout.by_name["classifier.weight"])
    torch.testing.assert_close(found.adapter.dense["classifier.weight"], head, rtol=0, atol=1e-12)
    for module, _, _ in MODULES:
        parts = [s.factors[module] for s in (found.adapter, found.residual) if s is not None]
        merged = sum(part["B"] @ part["A"] for part in parts)
        # The row of a method that restarts is the next round's random start.
        wanted = (
            0.0 if method.capabilities.restarts else update(cohort.layout, expected.row, module)
        )
        if module in expected.residual:
            outer, inner = expected.residual[module]
            wanted = wanted + outer.T @ inner
        torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-9 * float(wanted.norm()))
    assert found.flags == expected.flags


@pytest.mark.parametrize("dora", [False, True])
def test_a_faulty_adapter_has_no_part_in_anything(tmp_path, dora):
    five = cluster(tmp_path, dora=dora)
    found = aggregate(
        five,
        WEIGHTS,
        method="robust_krum",
        options={"host": "flora"},
        out=tmp_path / "out",
        group_bytes=1,
    )
    assert len(found.flags) == 1 + dora
    assert found.flags[-1].startswith("c: left out, its score ")
    assert found.dropped == ()
    assert not found.exact
    honest = [five[name] for name in "abde"]
    weights = [WEIGHTS[name] for name in "abde"]
    written = folder_products(tmp_path / "out")
    for module, matrix in mean_products(honest, weights).items():
        torch.testing.assert_close(written[module], matrix, rtol=0, atol=1e-9)
        assert found.adapter.rank(module) == 4 * 3
    for key, tensor in stored_tensors(tmp_path / "out").items():
        if "lora_A" in key or "lora_B" in key:
            continue
        own = [stored_tensors(folder)[key] for folder in honest]
        mean = sum(w * t for w, t in zip(weights, own, strict=True)) / sum(weights)
        torch.testing.assert_close(tensor, mean, rtol=0, atol=1e-12)


def test_errors_are_against_the_mean_of_all_adapters(five):
    found = aggregate(five, WEIGHTS, method="robust_krum", group_bytes=1)
    lost = norm = 0.0
    result = products(found.adapter.to_peft(), found.adapter.config)
    for module, matrix in mean_products(list(five.values()), list(WEIGHTS.values())).items():
        lost += float((matrix - result[module]).norm()) ** 2
        norm += float(matrix.norm()) ** 2
    rows = {row.method: row for row in found.errors}
    assert rows["robust_krum"].chosen
    assert rows["robust_krum"].error == pytest.approx((lost / norm) ** 0.5, rel=1e-6)
    assert rows["robust_krum"].error > 0.5
    # The alternatives average all of them.
    plain = {row.method: row.error for row in aggregate(five, WEIGHTS).errors}
    assert rows.keys() - {"robust_krum"} == plain.keys()
    assert not any(name.startswith("robust") for name in plain)
    for name, error in plain.items():
        assert rows[name].error == pytest.approx(error, rel=1e-6)


def test_too_few_adapters_are_refused_before_any_is_read(five, tmp_path):
    seen = []
    message = r"^robust_krum with faulty = 1 needs 5 clients or more, it has 3$"
    for chosen in ({k: five[k] for k in "abc"}, five):
        with pytest.raises(FedcoreError, match=message):
            aggregate(
                chosen,
                None if len(chosen) == 3 else {**dict.fromkeys("abc", 1), "d": 0, "e": 0},
                method="robust_krum",
                out=tmp_path / "out",
                progress=lambda done, total: seen.append(done),
            )
    assert seen == []
    assert not (tmp_path / "out").exists()


def test_values_of_those_left_out_are_checked_as_all_others(five, tmp_path):
    for key in ("classifier.weight", "block.1.q.lora_B.weight"):
        tensors = stored_tensors(five["c"])
        tensors[f"base_model.model.{key}"][1, 2] = torch.nan
        write_folder(tmp_path / "nan", tensors, config_of(five["c"]))
        with pytest.raises(FedcoreError, match=r"^c: .* not finite"):
            aggregate({**five, "c": tmp_path / "nan"}, method="robust_krum", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_both_passes_are_counted(five):
    seen = []
    aggregate(
        five,
        method="robust_median",
        group_bytes=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(n + 1, 3 + 3 + 20) for n in range(26)]


def test_the_rank_is_the_hosts_to_choose(five, tmp_path):
    found = aggregate(five, method="robust_krum", rank=2, options={"keep": 1})
    assert {found.adapter.rank(module) for module in found.adapter.factors} == {2}
    with pytest.raises(FedcoreError, match=r"rank is 2: fedit does not choose"):
        aggregate(five, method="robust_krum", rank=2, options={"host": "fedit"})


def test_what_the_host_needs_is_asked_for(five, mixed):
    with pytest.raises(FedcoreError, match=r"robust_clip with host fedrot needs the rounds of a"):
        aggregate(five, method="robust_clip", options={"host": "fedrot"})
    with pytest.raises(FedcoreError, match=r"robust_clip makes no use of previous"):
        aggregate(five, method="robust_clip", previous=five["a"])
    with pytest.raises(FedcoreError, match=r"fedit needs equal ranks"):
        aggregate(mixed, method="robust_clip", options={"host": "fedit"})
