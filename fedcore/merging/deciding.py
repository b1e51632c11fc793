"""The first of two passes: which adapters count, before any module is aggregated."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedcore.merging.reading import Job, cohorts
from fedcore.methods.decisions import Decision, Rule
from fedcore.methods.product_distances import cohort_gram


def decide(job: Job, rule: Rule, step: Callable[[], None]) -> Decision:
    """What ``rule`` decides about the whole adapters of ``job``, in the order of its sources.

    Every group is read once and leaves the N x N inner products of its updates alone.

    Args:
        step: called after every group.

    Raises:
        FedcoreError: too few adapters for the rule, before any is read; or as :func:`cohorts`.
    """
    clients = len(job.sources)
    rule.check_clients(clients)
    gram = torch.zeros(clients, clients, dtype=torch.float64)
    for _, cohort in cohorts(job):
        gram += cohort_gram(cohort)
        step()
    return rule.decide([source.name for source in job.sources], job.weights, gram)
