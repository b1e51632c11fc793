"""Who holds which examples: IID, Dirichlet and by-label splits over clients.

``iid``: a random permutation cut into parts whose sizes differ by at most one.

``dirichlet``: for each class k draw ``p_k ~ Dir(alpha 1)`` over the clients and split the shuffled
examples of the class in these proportions (Yurochkin et al., "Bayesian Nonparametric Federated
Learning of Neural Networks", ICML 2019, arXiv:1905.12022). Client sizes differ as well as class
mixtures; the definition of Hsu et al. (arXiv:1909.06335), which draws each client's mixture over
the classes and keeps sizes equal, is another one.

``by_label``: each client holds exactly ``labels_per_client`` classes, each class held by the same
number of clients to within one and its examples shared out evenly among them (the ``#C = k`` split
of Li et al., "Federated Learning on Non-IID Data Silos: An Experimental Study", ICDE 2022,
arXiv:2102.02079).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.data.seeding import derive_seed
from fedcore.errors import FedcoreError, unknown_name

MAX_DRAWS = 1000
"""Draws of a random split before ``min_examples`` is given up as out of reach."""

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Partition:
    """Disjoint index sets, one per client, that together hold every example.

    Attributes:
        indices: for each client its examples, int64, ascending, read-only.
        class_counts: examples of each class at each client, int64 ``(N, classes)``, read-only.
    """

    indices: tuple[Indices, ...]
    class_counts: Indices

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def sizes(self) -> Indices:
        """Examples of each client, int64 ``(N,)``."""
        return self.class_counts.sum(axis=1)


def _check_labels(name: str, labels: Any) -> Indices:
    array = np.asarray(labels)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise FedcoreError(
            f"{name} has shape {array.shape} and type {array.dtype}; pass one integer per example"
        )
    if array.min() < 0:
        raise FedcoreError(f"{name} holds {array.min()}; classes are counted from 0")
    return array.astype(np.int64)


def _freeze(parts: Sequence[Indices], labels: Indices, classes: int) -> Partition:
    indices = tuple(np.sort(part).astype(np.int64) for part in parts)
    counts = np.stack([np.bincount(labels[part], minlength=classes) for part in indices])
    for array in (*indices, counts):
        array.setflags(write=False)
    return Partition(indices, counts.astype(np.int64, copy=False))


def _iid(rng: np.random.Generator, labels: Indices, clients: int) -> list[Indices]:
    return list(np.array_split(rng.permutation(labels.size), clients))


def _dirichlet(
    rng: np.random.Generator, labels: Indices, clients: int, alpha: float
) -> list[Indices]:
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    for k in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == k))
        shares = rng.dirichlet(np.full(clients, alpha))
        if not np.isfinite(shares).all():
            raise FedcoreError(
                f"alpha is {alpha}; a Dirichlet draw over {clients} clients overflows"
            )
        cuts = np.floor(np.cumsum(shares)[:-1] * members.size).astype(np.int64)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def _by_label(
    rng: np.random.Generator, labels: Indices, clients: int, labels_per_client: int
) -> list[Indices]:
    classes = np.unique(labels)
    owners: list[list[int]] = [[] for _ in classes]
    for client in rng.permutation(clients):
        # The least used classes first, ties at random: uses differ by at most one throughout.
        uses = np.array([len(holders) for holders in owners])
        order = np.lexsort(np.stack([rng.random(classes.size), uses]))
        for k in order[:labels_per_client]:
            owners[k].append(int(client))
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    for k, holders in zip(classes, owners, strict=True):
        members = rng.permutation(np.flatnonzero(labels == k))
        pieces = np.array_split(members, len(holders))
        for client, piece in zip(rng.permutation(holders), pieces, strict=True):
            parts[client].append(piece)
    return [np.concatenate(part) for part in parts]


def _check_by_label(labels: Indices, clients: int, labels_per_client: int) -> None:
    present, sizes = np.unique(labels, return_counts=True)
    if not 1 <= labels_per_client <= present.size:
        raise FedcoreError(
            f"labels_per_client is {labels_per_client}; it must lie between 1 and {present.size}"
        )
    if clients * labels_per_client < present.size:
        raise FedcoreError(
            f"{clients} clients with {labels_per_client} labels each cannot cover "
            f"{present.size} classes"
        )
    holders = -(-clients * labels_per_client // present.size)
    if sizes.min() < holders:
        raise FedcoreError(
            f"class {present[sizes.argmin()]} has {sizes.min()} examples for {holders} clients"
        )


def partition(
    labels: Any,
    clients: int,
    kind: str = "iid",
    *,
    alpha: float = 0.5,
    seed: int = 0,
    min_examples: int = 1,
    labels_per_client: int = 2,
) -> Partition:
    """Split n examples over ``clients``; the module's docstring defines the kinds.

    Args:
        labels: the class of each example, integers ``(n,)``.
        clients: N.
        kind: ``"iid"``, ``"dirichlet"`` or ``"by_label"``.
        alpha: concentration of ``dirichlet``; small is uneven, large approaches equal proportions.
        seed: the same arguments give the same partition.
        min_examples: what each client must hold; the split is drawn again, up to ``MAX_DRAWS``
            times, until it does.
        labels_per_client: classes of each client in ``by_label``.

    Returns:
        Disjoint sorted index sets that cover ``0 .. n-1``.

    Raises:
        FedcoreError: an unknown kind, a bad argument, or no draw that gives every client
            ``min_examples``.

    Example:
        >>> split = partition([0, 0, 1, 1], 2, "by_label", labels_per_client=1)
        >>> sorted(part.tolist() for part in split.indices)
        [[0, 1], [2, 3]]
    """
    array = _check_labels("labels", labels)
    draws: dict[str, Callable[[np.random.Generator, Indices, int], list[Indices]]] = {
        "iid": _iid,
        "dirichlet": partial(_dirichlet, alpha=alpha),
        "by_label": partial(_by_label, labels_per_client=labels_per_client),
    }
    if kind not in draws:
        raise unknown_name("partition", kind, draws)
    if clients < 1:
        raise FedcoreError(f"clients is {clients}; it must be at least 1")
    if min_examples < 1:
        raise FedcoreError(f"min_examples is {min_examples}; it must be at least 1")
    if clients * min_examples > array.size:
        raise FedcoreError(
            f"{array.size} examples cannot give {clients} clients min_examples={min_examples} each"
        )
    if kind == "dirichlet" and not 0.0 < alpha < np.inf:
        raise FedcoreError(f"alpha is {alpha}; it must be positive and finite")
    if kind == "by_label":
        _check_by_label(array, clients, labels_per_client)

    best = 0
    for draw in range(MAX_DRAWS):
        rng = np.random.default_rng(derive_seed(seed, "partition", kind, draw))
        parts = draws[kind](rng, array, clients)
        smallest = min(part.size for part in parts)
        if smallest >= min_examples:
            return _freeze(parts, array, int(array.max()) + 1)
        best = max(best, smallest)
    tried = {"dirichlet": f" with alpha={alpha}", "by_label": f" with {labels_per_client} labels"}
    raise FedcoreError(
        f"no {kind} partition{tried.get(kind, '')} in {MAX_DRAWS} draws gave each of {clients} "
        f"clients min_examples={min_examples}; at best the smallest had {best}"
    )


def assign_like(reference: Partition, labels_test: Any, seed: int) -> Partition:
    """Spread held-out examples over the clients of ``reference`` by their own class proportions.

    Of the ``n_k`` held-out examples of class k client c receives ``n_k counts[c, k] / sum_c
    counts[c, k]``, to within one (largest remainder, ties at random). Every example goes to exactly
    one client; a client with little data may receive none.

    Args:
        reference: the partition of the training examples.
        labels_test: the class of each held-out example, integers ``(m,)``.
        seed: the same arguments give the same assignment.

    Raises:
        FedcoreError: a class that no client holds.
    """
    array = _check_labels("labels_test", labels_test)
    counts = reference.class_counts
    clients, classes = counts.shape
    rng = np.random.default_rng(derive_seed(seed, "assign-like"))
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    for k in np.unique(array):
        examples = counts[:, k].sum() if k < classes else 0
        if examples == 0:
            raise FedcoreError(f"labels_test holds class {k}, which no client has examples of")
        members = rng.permutation(np.flatnonzero(array == k))
        # Integer arithmetic: remainders that are equal compare equal.
        whole, remainder = np.divmod(members.size * counts[:, k], examples)
        order = np.lexsort(np.stack([rng.random(clients), -remainder]))
        whole[order[: members.size - whole.sum()]] += 1
        for part, piece in zip(parts, np.split(members, np.cumsum(whole)[:-1]), strict=True):
            part.append(piece)
    return _freeze([np.concatenate(part) for part in parts], array, classes)
