"""Wrong implementations that FedRot's check is to notice."""

import numpy as np
import pytest
from scipy.linalg import expm, logm

from fedcore.methods import create_method
from fedcore.methods.lora.fedrot import FedRot
from fedcore_theory.checks.fedrot import fr_soft_rotations as fr
from fedcore_theory.models.graded_rounds import polar_factor
from fedcore_theory.rounds import server_round


def red(outcome):
    return "; ".join(one.what for one in outcome.measured if not one.holds)


def polar_without_determinant(matrix, strength):
    return polar_factor((1 - strength) * np.eye(len(matrix)) + strength * polar_factor(matrix))


def not_orthogonal(matrix, strength):
    return (1 - strength) * np.eye(len(matrix)) + strength * fr.shipped(matrix, 1.0)


def the_other_end(matrix, strength):
    return fr.shipped(matrix, 1 - strength)


def along_the_geodesic(matrix, strength):
    return np.real(expm(strength * logm(fr.shipped(matrix, 1.0))))


def transposed(matrix, strength):
    return fr.shipped(matrix, strength).T


@pytest.mark.parametrize(
    ("soft", "where"),
    [
        (polar_without_determinant, "least determinant"),
        (not_orthogonal, "angles"),
        (the_other_end, "angles"),
        (along_the_geodesic, "angles"),
        (transposed, "angles"),
    ],
)
def test_fr_rejects_a_rotation(soft, where):
    assert where in red(fr.CHECK.run(3, soft=soft))


def turned(case, method, left, right):
    """One client's factors, turned by hand and averaged by FedIT."""
    A, B = case.own
    turn = fr.shipped(A @ case.A.T, method.strength)
    sent = {"A": left(turn, A)[None], "B": right(turn, B)[None]}
    return server_round(create_method("fedit"), sent)


def turns_a_alone(case, method):
    return turned(case, method, lambda turn, A: turn.T @ A, lambda turn, B: B)


def turns_both_by_the_transpose(case, method):
    return turned(case, method, lambda turn, A: turn @ A, lambda turn, B: B @ turn.T)


def turns_nothing(case, method):
    return fr.upload(case, FedRot(strength=0.0))


@pytest.mark.parametrize(
    ("send", "where"),
    [
        (turns_a_alone, "client's product"),
        (turns_both_by_the_transpose, "distance to the reference"),
        (turns_nothing, "distance to the reference"),
    ],
)
def test_fr_rejects_an_upload(send, where):
    assert where in red(fr.CHECK.run(3, send=send))


def test_a_reflection_is_where_the_determinant_matters():
    # On rotations the polar factor of the interpolant is right without asking for it.
    case = fr.draw(0)
    whole = case.rotation(case.angles)
    assert np.allclose(polar_without_determinant(whole, 0.4), fr.shipped(whole, 0.4))
