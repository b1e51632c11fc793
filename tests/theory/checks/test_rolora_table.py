"""Wrong ways to average RoLoRA's table that its check is to notice."""

import numpy as np
import pytest

from fedcore_theory.checks.rolora import r14_printed_averages as r14


def median(row):
    return float(np.median(row.accuracies))


def as_printed(row):
    return row.printed


def forgets_a_task(row):
    return float(np.mean(row.accuracies[:4]))


@pytest.mark.parametrize("average", [median, as_printed, forgets_a_task])
def test_r14_rejects(average):
    found = r14.CHECK.run(average=average)
    assert not found.measured[0].holds
