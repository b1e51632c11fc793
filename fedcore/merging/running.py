"""A method on whole adapters."""

from __future__ import annotations

import torch

from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore.methods.base import Aggregate, Broadcast, Method
from fedcore_kernels.errors import KernelInputError


def aggregating(method: Method) -> Method:
    """The method that forms the result: the host of one with a rule, otherwise itself."""
    return method if method.rule is None else method.rule.inner()


def run_method(method: Method, cohort: Cohort, previous: Broadcast) -> Aggregate:
    """``method`` on whole uploads, of which it sees what its clients would send.

    Raises:
        FedcoreError: the method refuses the cohort, or cannot decompose its values.
    """
    sent = method.upload_layout(cohort.layout, 0)
    if sent != cohort.layout:
        updates = cohort.layout.gather(cohort.updates, sent)
        cohort = Cohort(
            sent, updates, cohort.weights, cohort.client_ids, 0, cohort.ranks, cohort.scalings
        )
    try:
        return method.aggregate(cohort, previous)
    except (KernelInputError, torch.linalg.LinAlgError) as error:
        raise FedcoreError(f"{method.name}: {error}") from error
