import math

import pytest

from fedcore.errors import FedcoreError
from fedcore.federation.measures import ACCURACY, PERPLEXITY, measure_of


def test_perplexity_is_the_exponential_of_the_loss_and_accuracy_is_itself():
    assert PERPLEXITY.of(0.25, math.log(7)) == pytest.approx(7, rel=1e-15)
    assert ACCURACY.of(0.25, 9.0) == 0.25
    assert PERPLEXITY.of(0.5, None) is None
    assert PERPLEXITY.of(0.5, math.nan) is None
    assert PERPLEXITY.of(0.5, 1e4) == math.inf
    assert ACCURACY.of(None, 1.0) is None


def test_best_and_worst_change_sides():
    values = [3.0, 1.5, 2.0]
    assert (ACCURACY.best(values), ACCURACY.worst(values)) == (3.0, 1.5)
    assert (PERPLEXITY.best(values), PERPLEXITY.worst(values)) == (1.5, 3.0)
    assert PERPLEXITY.best([]) is ACCURACY.worst([]) is None
    assert ACCURACY.reaches(0.9, 0.9)
    assert not ACCURACY.reaches(0.8, 0.9)
    assert PERPLEXITY.reaches(8.0, 9.0)
    assert not PERPLEXITY.reaches(10.0, 9.0)


def test_tasks_have_their_measure():
    assert measure_of("classification") is ACCURACY
    assert measure_of("causal") is PERPLEXITY
    with pytest.raises(FedcoreError, match="unknown task 'casual'; did you mean causal"):
        measure_of("casual")
