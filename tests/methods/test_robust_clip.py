from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.methods import create_method
from tests.property.faulty_clients import clustered_round
from tests.property.lora_rounds import LoraRound, lora_rounds, make_lora_round
from tests.reference.updates import update


def whole(cohort, row):
    return torch.cat([update(cohort.layout, row, m).flatten() for m in cohort.layout.modules])


@given(lora_rounds(kinds=("random", "near", "shared_a", "mixed_ranks")), st.floats(0.01, 1e4))
def test_the_mean_is_that_of_the_clipped_products(case: LoraRound, limit):
    result = create_method("robust_clip", host="flora", limit=limit).aggregate(
        case.cohort, case.previous
    )
    expected, names = 0.0, []
    for n, client in enumerate(case.cohort.client_ids):
        if case.cohort.weights[n] == 0:
            continue
        product = whole(case.cohort, case.cohort.updates[n])
        scale = min(1.0, limit / float(product.norm()))
        expected = expected + case.cohort.shares[n] * scale * product
        if scale < 1 - 1e-12:
            names.append(client)
    found = torch.cat(
        [
            (result.residual[m].outer.T @ result.residual[m].inner).flatten()
            for m in case.cohort.layout.modules
        ]
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * (1 + float(expected.norm())))
    assert float(found.norm()) <= limit * (1 + 1e-9)
    assert [flag.split(":")[0] for flag in result.flags] == names


def test_a_client_can_move_the_mean_by_its_share_of_the_limit_alone():
    case = clustered_round(5)
    host = create_method("robust_clip", host="flora", limit=2.0)
    norms = []
    for scale in (1.0, -1e12):
        moved = clustered_round(5, [3], scale=scale)
        result = host.aggregate(moved.cohort, moved.previous)
        norms.append(
            torch.cat(
                [
                    (result.residual[m].outer.T @ result.residual[m].inner).flatten()
                    for m in case.cohort.layout.modules
                ]
            )
        )
    assert float((norms[0] - norms[1]).norm()) <= 2 * 2.0 / 5 * (1 + 1e-9)


def test_without_a_limit_it_is_the_median_norm_whatever_the_weights():
    case = clustered_round(5, [1], scale=1e6, weights=[1.0, 1e6, 1.0, 1.0, 1.0])
    result = create_method("robust_clip").aggregate(case.cohort, case.previous)
    norms = torch.stack([whole(case.cohort, row).norm() for row in case.cohort.updates])
    middle = norms.sort().values[2]
    above = [f"c00{n}" for n in range(5) if norms[n] > middle]
    assert [flag.split(":")[0] for flag in result.flags] == above
    assert "c001" in above
    assert float(whole(case.cohort, result.row).norm()) <= float(middle) * (1 + 1e-6)
    assert result.flags[above.index("c001")].startswith(
        f"c001: scaled by {middle / norms[1]:.3g}, its norm {norms[1]:.3g} is above {middle:.3g}"
    )


def test_what_is_below_the_limit_keeps_its_bits():
    case = make_lora_round("random", [1.0, 3.0], ((33, 7), (7, 33)), 3, dtype=torch.bfloat16)
    found = create_method("robust_clip", limit=1e9).aggregate(case.cohort, case.previous)
    plain = create_method("product_svd").aggregate(case.cohort, case.previous)
    assert torch.equal(found.row, plain.row)
    assert found.flags == plain.flags


def test_identical_clients_are_clipped_as_any_others():
    case = make_lora_round("identical", [1.0, 2.0, 3.0], ((33, 7), (7, 33)), 3)
    size = float(whole(case.cohort, case.cohort.updates[0]).norm())
    result = create_method("robust_clip", limit=size / 4).aggregate(case.cohort, case.previous)
    target = whole(case.cohort, case.cohort.updates[0]) / 4
    torch.testing.assert_close(whole(case.cohort, result.row), target, rtol=1e-9, atol=1e-9)
    assert len(result.flags) == 3
