"""Wrong guards, scalings and Grams that the checks of systems are to notice."""

import numpy as np
import pytest

from fedcore.errors import FedcoreError
from fedcore.methods.robust.rules import RobustKrum
from fedcore_theory.checks.systems import s01_sums_only as s1
from fedcore_theory.checks.systems import s02_scalings as s2
from fedcore_theory.checks.systems import s03_robust_gram as s3


def red(outcome):
    """What failed, in words."""
    return [one.what for one in outcome.measured if not one.holds]


def never(updates):
    return False


def always(updates):
    return True


def first_numbers_only(updates):
    return bool((updates[:, :1] == 0).all())


@pytest.mark.parametrize("notices", [never, always, first_numbers_only])
def test_s1_rejects_other_alarms(notices):
    found = red(s1.CHECK.run(1, notices=notices))
    wanted = "separate uploads that raise" if notices is always else "identical uploads that pass"
    assert found[0].startswith(wanted)


def permits_all(method):
    return None


def permits_exact_ones(method):
    if method.description.exact == "no":
        raise FedcoreError("refused")


@pytest.mark.parametrize("permits", [permits_all, permits_exact_ones])
@pytest.mark.parametrize("place", ["engine_permits", "method_permits"])
def test_s1_rejects_other_guards(place, permits):
    found = red(s1.CHECK.run(1, **{place: permits}))
    assert found == ["methods let through or refused wrongly"]


def not_divided_on_the_way_down(adapters):
    models = s2.shipped(adapters)
    return [16 / len(A) * model for (A, _), model in zip(adapters, models, strict=True)]


def divided_twice(adapters):
    models = s2.shipped(adapters)
    return [model / (16 / len(A)) for (A, _), model in zip(adapters, models, strict=True)]


def rank_stabilised(adapters):
    return s2.shipped([(A, np.sqrt(len(A)) * B) for A, B in adapters])


def scalings_absorbed_twice(adapters):
    return s2.shipped([(A, 16 / len(A) * B) for A, B in adapters])


@pytest.mark.parametrize(
    "models",
    [
        s2.blind,
        not_divided_on_the_way_down,
        divided_twice,
        rank_stabilised,
        scalings_absorbed_twice,
    ],
)
def test_s2_rejects(models):
    assert red(s2.CHECK.run(1, models=models)) == ["relative error, scalings absorbed"]


def test_s2_s_mistake_passes_where_alpha_is_the_rank(monkeypatch):
    monkeypatch.setattr(s2, "_RANKS", (16, 16, 16))
    case = s2.draw(0)
    blind, ours = s2.blind(case), s2.shipped(case)
    assert all(np.allclose(*pair) for pair in zip(blind, ours, strict=True))


def transposed_block(A, B):
    left = np.einsum("ioa,job->ijab", B, B)
    right = np.einsum("iak,jbk->jiab", A, A)
    return (left * right).sum((2, 3))


def unscaled_factors(A, B):
    return s3.shipped(A, B / np.linalg.norm(B, axis=(1, 2), keepdims=True))


def factors_themselves(A, B):
    rows = np.concatenate([A.reshape(len(A), -1), B.reshape(len(B), -1)], axis=1)
    return rows @ rows.T


def traces_of_blocks(A, B):
    return np.einsum("ioa,joa->ij", B, B) * np.einsum("iak,jak->ij", A, A)


def single_precision(A, B):
    products = (B.astype(np.float32) @ A.astype(np.float32)).reshape(len(A), -1)
    return (products @ products.T).astype(float)


@pytest.mark.parametrize(
    "gram",
    [transposed_block, unscaled_factors, factors_themselves, traces_of_blocks, single_precision],
)
def test_s3_rejects_other_grams(gram):
    assert red(s3.CHECK.run(1, gram=gram))[0] == "Gram off the dense products, relative"


def test_s3_sees_that_distances_of_factors_judge_gauges():
    found = red(s3.CHECK.run(1, gram=factors_themselves))
    assert "change of the Gram with gauges, relative" in found
    assert "distance read for 1e-8 of the norm" in found


def test_s3_rejects_a_rule_that_expects_no_faulty_client():
    found = red(s3.CHECK.run(1, judges=[RobustKrum(faulty=0)]))
    assert found == ["faulty clients kept by Krum and medoid"]


@pytest.mark.parametrize("centre", ["product_svd", "robust_clip"])
def test_s3_rejects_rules_that_faulty_clients_move(centre):
    assert red(s3.CHECK.run(1, centre=centre)) == ["error of the geometric median"]
