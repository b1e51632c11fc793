"""Wrong implementations that the checks of CE-LoRA and tri-factor adapters are to notice."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from fedcore.methods.tri.ce_lora.class_mixtures import fit_class_mixtures
from fedcore.methods.tri.ce_lora.method import CELoRA
from fedcore.methods.tri.ce_lora.similarity import client_distances
from fedcore_theory.checks.ce_lora import c01_dead_starts as c1
from fedcore_theory.checks.ce_lora import c02_common_bases as c2
from fedcore_theory.checks.ce_lora import c03_private_bases as c3
from fedcore_theory.checks.ce_lora import c04_projected_core as c4
from fedcore_theory.checks.ce_lora import c05_what_a_core_carries as c5
from fedcore_theory.checks.ce_lora import c06_likeness_of_cores as c6
from fedcore_theory.checks.ce_lora import c07_distance_of_data as c7
from fedcore_theory.checks.ce_lora import c08_release_rule as c8
from fedcore_theory.models.tri_factors import CommonBases
from fedcore_theory.rounds import server_round


def red(outcome):
    """What came out wrong; nothing may be so because it could not be computed."""
    assert all(np.isfinite(one.value) for one in outcome.measured)
    return [one.what for one in outcome.measured if not one.holds]


class CoreOnly(CELoRA):
    def plan(self, round):
        return replace(super().plan(round), trains=frozenset("R"))


def takes_everything(start, trains):
    return False


def looks_at_b_only(start, trains):
    return "B" not in trains and not start["B"].any()


def refuses_cores_alone(start, trains):
    return trains == "R"


@pytest.mark.parametrize("rule", [takes_everything, looks_at_b_only, refuses_cores_alone])
def test_c1_rejects_a_wrong_rule(rule):
    assert red(c1.CHECK.run(1, refuses=rule)) == ["starts that the rule judges wrongly"]


def test_c1_rejects_a_method_that_trains_only_the_core_from_b_zero():
    assert red(c1.CHECK.run(1, methods=lambda: [CoreOnly()])) == ["shipped methods that start dead"]


@pytest.mark.parametrize("trains", c1.SUBSETS)
@pytest.mark.parametrize("init", c1.STARTS)
def test_the_tuner_refuses_what_c1_finds_dead(init, trains):
    tuners = pytest.importorskip("fedcore.tuners")
    chosen = {f"train_{factor}": factor in trains for factor in "ARB"}
    case = c1.draw(0)
    losses = c1.losses(case.starts[init], trains, case.target)
    if (losses == losses[0]).all():
        with pytest.raises(ValueError, match="zero for ever"):
            tuners.TriConfig(init=init, **chosen)
    else:
        assert set(tuners.TriConfig(init=init, **chosen).trains) == set(trains)


def transposes_cores(clients, bases):
    return c2.fed_sb(replace(clients, R=clients.R.transpose(0, 2, 1)), bases)


def forgets_the_weights(clients, bases):
    return c2.fed_sb(replace(clients, weights=np.ones(len(clients.R))), bases)


@pytest.mark.parametrize("mean", [transposes_cores, forgets_the_weights])
def test_c2_rejects_a_wrong_mean(mean):
    assert "largest entry of the error, mean of cores" in red(c2.CHECK.run(1, mean=mean))


def mixes_with_cosines_of_the_cores(clients, bases):
    # I is added so that R - I, which is what the method compares, is R itself.
    shifted = replace(clients, R=clients.R + np.eye(3))
    found = c2.ce_lora(shifted, bases)
    cores = {n: {"R": one["R"] - np.eye(3)} for n, one in found.personal.items()}
    return replace(found, personal=cores)


def gives_everyone_the_mean(clients, bases):
    method = CELoRA(lam=0.0, temperature=1e18)
    return server_round(method, clients.uploads, clients.weights)


@pytest.mark.parametrize("mixes", [mixes_with_cosines_of_the_cores, gives_everyone_the_mean])
def test_c2_rejects_wrong_mixes(mixes):
    assert red(c2.CHECK.run(1, mixes=mixes)) == ["the same, each client's mix"]


def transposed(bases, gradient):
    return c2.core_gradient(bases, gradient).swapaxes(-1, -2)


def swaps_the_bases(bases, gradient):
    # On the square part of the weight, so that the shapes do not give the mistake away.
    size = bases.A.shape[1]
    left, right = bases.A.T, bases.B.T[:, :size]
    return left.T @ gradient[:, :size, :size] @ right.T


@pytest.mark.parametrize("gradient", [transposed, swaps_the_bases])
def test_c2_rejects_a_wrong_gradient(gradient):
    assert red(c2.CHECK.run(1, gradient=gradient)) == ["the same, a step against P_B g P_A"]


def mixes_products(clients):
    """What averaging of models would give: exact, in every gauge."""
    return np.broadcast_to(clients.mean_product, clients.products.shape)


def uses_the_first_client_s_bases(clients):
    own = c3.uniform_mixes(clients)
    return np.broadcast_to(own[0], own.shape) * 3


def test_c3_tells_averaged_models_from_averaged_cores():
    assert "smallest error after rotation" in red(c3.CHECK.run(1, models=mixes_products))


def test_c3_rejects_wrong_bases():
    found = red(c3.CHECK.run(1, models=uses_the_first_client_s_bases))
    assert "largest error without drift" in found


def transposes_instead_of_pseudo_inverses(clients, bases):
    cores = (bases.B.T @ clients.B) @ clients.R @ (clients.A @ bases.A.T)
    return bases.B @ np.einsum("n,nrs->rs", clients.weights, cores) @ bases.A


def averages_cores_as_they_are(clients, bases):
    return bases.B @ np.einsum("n,nrs->rs", clients.weights, clients.R) @ bases.A


def projects_onto_one_side_only(clients, bases):
    left = bases.B @ np.linalg.pinv(bases.B)
    return left @ clients.mean_product


def test_c4_rejects_transposes():
    found = red(c4.CHECK.run(1, model=transposes_instead_of_pseudo_inverses))
    assert "largest difference from P_B M P_A" in found


def test_c4_rejects_cores_that_are_not_projected():
    found = red(c4.CHECK.run(1, model=averages_cores_as_they_are))
    assert "largest change by another gauge" in found


def test_c4_rejects_one_sided_projections():
    found = red(c4.CHECK.run(1, model=projects_onto_one_side_only))
    assert "largest difference from P_B M P_A" in found


def test_c4_rejects_a_zero_basis_that_is_taken():
    def takes_it(clients, bases):
        return c4.shipped(clients, bases) if bases.B.any() else np.zeros((64, 64))

    found = red(c4.CHECK.run(1, model=takes_it))
    assert found == ["broadcasts with B_0 = 0 that were taken"]


def test_c4_does_not_need_orthonormal_bases():
    case = c3.draw(0)
    stretched = CommonBases(3 * case.bases.A, np.diag(np.linspace(1, 2, 64)) @ case.bases.B)
    clients = case.clients[0.3]
    left = stretched.B @ np.linalg.pinv(stretched.B)
    right = np.linalg.pinv(stretched.A) @ stretched.A
    wanted = left @ clients.mean_product @ right
    np.testing.assert_allclose(c4.shipped(clients, stretched), wanted, atol=1e-12)


def test_c5_notices_bases_averaged_with_the_cores():
    found = red(c5.CHECK.run(1, shared={**c5.SHARED, "R": c5.everything}))
    assert found[0] == "largest difference, cores shared and nothing shared"


def test_c5_notices_an_exchange_that_does_not_reach_the_clients():
    found = red(c5.CHECK.run(1, shared={**c5.SHARED, "A, B and R": c5.nothing}))
    assert "error alone / all shared, equal targets" in found


def of_the_moves(cores):
    return c6.cka(cores - np.eye(c6.SIZE))


def with_the_root_forgotten(cores):
    return c6.cka(cores) ** 2


def of_rows(cores):
    return c6.cka(cores.transpose(0, 2, 1))


@pytest.mark.parametrize("cka", [of_the_moves, with_the_root_forgotten, of_rows])
def test_c6_rejects_a_wrong_cka(cka):
    assert "largest violation of a law of CKA" in red(c6.CHECK.run(1, cka=cka))


def test_c6_rejects_a_cosine_of_the_cores_themselves():
    found = red(c6.CHECK.run(1, cosine=lambda moves: c6.cosine(moves + np.eye(c6.SIZE))))
    assert "mean cosine of the same moves" in found
    assert "cosine of a move and its opposite" in found


def test_c6_rejects_a_blind_cosine():
    found = red(c6.CHECK.run(1, cosine=lambda moves: np.abs(c6.cosine(moves))))
    assert "cosine of a move and its opposite" in found


def test_c6_rejects_a_cosine_without_a_value_at_zero():
    def divides(moves):
        flat = moves.reshape(len(moves), -1)
        unit = flat / np.maximum(np.linalg.norm(flat, axis=1), 1e-300)[:, None]
        return unit @ unit.T

    assert red(c6.CHECK.run(1, cosine=divides)) == ["error of the cosine where cores did not move"]


def test_c6_rejects_a_value_that_is_not_a_number():
    def divides(moves):
        flat = moves.reshape(len(moves), -1)
        with np.errstate(invalid="ignore"):
            unit = flat / np.linalg.norm(flat, axis=1)[:, None]
        return unit @ unit.T

    outcome = c6.CHECK.run(1, cosine=divides)
    assert not outcome.holds


def variances_for_deviations(mixtures):
    return client_distances([replace(m, deviations=m.deviations**2) for m in mixtures])


def squared_again(mixtures):
    return client_distances(mixtures) ** 2


def equal_shares(mixtures):
    return client_distances([replace(m, shares=np.full(len(m.sizes), 0.25)) for m in mixtures])


def unnormalised_weights(mixtures):
    return client_distances([replace(m, weights=2 * m.weights) for m in mixtures])


def matches_classes_by_place(mixtures):
    found = client_distances(mixtures)
    for i, first in enumerate(mixtures):
        for j, second in enumerate(mixtures):
            if first.means.shape == second.means.shape:
                found[i, j] = ((first.means - second.means) ** 2).mean()
    return found


@pytest.mark.parametrize(
    ("distances", "law"),
    [
        (variances_for_deviations, "square of the scale: largest error"),
        (squared_again, "triangle: largest D_ik - D_ij - D_jk"),
        (equal_shares, "linear programs: largest error"),
        (unnormalised_weights, "linear programs: largest error"),
        (matches_classes_by_place, "order of classes and components: largest error"),
    ],
)
def test_c7_rejects(distances, law):
    assert law in red(c7.CHECK.run(1, distances=distances))


def ignores_the_rule(features, labels, seed, smallest):
    return fit_class_mixtures(features, labels, seed, 1)


def counts_from_nine(features, labels, seed, smallest):
    return fit_class_mixtures(features, labels, seed, max(1, smallest - 1))


def counts_on_average(features, labels, seed, smallest):
    """As many components as the size of the class allows, whatever each of them rests on."""
    count = min(3, len(features) // smallest)
    if not count:
        return {}
    model = GaussianMixture(count, covariance_type="diag", reg_covar=1e-5, random_state=seed)
    return {"means": torch.from_numpy(model.fit(features.numpy()).means_).float()}


@pytest.mark.parametrize(
    ("fit", "repetitions", "what"),
    [
        (ignores_the_rule, 1, "classes with more components than the rule allows"),
        (counts_from_nine, 1, "classes with more components than the rule allows"),
        (counts_on_average, 20, "smallest distance, ten behind each component"),
    ],
)
def test_c8_rejects(fit, repetitions, what):
    assert what in red(c8.CHECK.run(repetitions, fit=fit))
