"""CE-LoRA's mixing weights: distances between the clients' data, and between their cores.

``ce_lora mixing`` is the server's rule as a whole, ``client_distances`` the part of it that solves
transport problems; both on the CPU, in fp64.
"""

from __future__ import annotations

import numpy as np
import torch

from bench.baselines.looped_transport import looped_transport
from bench.case import Case, Other, Ours
from fedcore.data.cohort import Cohort
from fedcore.methods import Broadcast, create_method
from fedcore.methods.tri.ce_lora.class_mixtures import read_class_mixtures
from fedcore.methods.tri.ce_lora.similarity import client_distances
from fedcore_kernels import FactorLayout

CLASSES, COMPONENTS, FEATURES = 5, 3, 384
"""Of a client: topics of a small corpus, mixtures of three, the width of MiniLM."""

MODULES, RANK = 48, 4

MOST_PAIRS = 99
"""Pairs of clients that the loop is timed on."""


def mixing_case(clients: int) -> Case:
    """Random mixtures and cores near the identity, the same on every call."""
    cohort, previous = _round(clients)
    mixtures = [read_class_mixtures(cohort.statistics[c], c) for c in cohort.client_ids]
    pairs = clients * (clients - 1) // 2
    few = min(pairs, MOST_PAIRS)
    name = f"eager loop of ot.emd2 ({few} of {pairs} pairs)"
    method = create_method("ce_lora")
    components = clients * CLASSES * COMPONENTS
    read = 2 * 8 * components * FEATURES
    # The product of matrices behind all distances; the programs come on top.
    flops = 2 * components**2 * 2 * FEATURES
    ours = {
        "client_distances": Ours(
            lambda: client_distances(mixtures),
            bytes=read + 8 * clients**2,
            flops=flops,
            against=(name,),
            backend="numpy",
        ),
        "ce_lora mixing": Ours(
            lambda: method.mixing(cohort, previous),
            bytes=read + cohort.updates.nbytes + 8 * clients**2,
            flops=flops,
            against=(name,),
            backend="numpy",
        ),
    }
    others = {name: Other(lambda: looped_transport(mixtures, few), few / pairs)}
    sizes = f"N={clients} K={CLASSES} G={COMPONENTS} D={FEATURES} L={MODULES} r={RANK}"
    return Case(sizes, torch.float64, ours, others)


def _round(clients: int) -> tuple[Cohort, Broadcast]:
    draw, random = np.random.default_rng(0), torch.Generator().manual_seed(0)
    total = CLASSES * COMPONENTS
    names = tuple(f"client-{n:03}" for n in range(clients))
    statistics = {
        name: {
            "weights": torch.from_numpy(draw.dirichlet(np.ones(COMPONENTS), CLASSES).reshape(-1)),
            "means": torch.from_numpy(draw.normal(size=(total, FEATURES))),
            "variances": torch.from_numpy(draw.uniform(0.5, 2.0, (total, FEATURES))),
            "classes": torch.arange(CLASSES).repeat_interleave(COMPONENTS),
            "counts": torch.from_numpy(draw.integers(30, 300, CLASSES)),
        }
        for name in names
    }
    layout = FactorLayout.build([(f"layer.{j:03}", "R", RANK, RANK) for j in range(MODULES)])
    (group,) = layout.groups
    row = torch.zeros(layout.size)
    group.view(row).copy_(torch.eye(RANK))
    updates = row.repeat(clients, 1)
    group.view(updates).add_(0.1 * torch.randn(clients, MODULES, RANK, RANK, generator=random))
    cohort = Cohort(
        layout=layout,
        updates=updates,
        weights=torch.ones(clients, dtype=torch.float64),
        client_ids=names,
        round=0,
        ranks=torch.full((clients, MODULES), RANK),
        scalings=torch.ones(clients, MODULES, dtype=torch.float64),
        statistics=statistics,
    )
    return cohort, Broadcast(layout, row)
