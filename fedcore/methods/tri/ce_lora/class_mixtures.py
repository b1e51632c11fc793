"""The statistics that a CE-LoRA client sends of its data: a small Gaussian mixture per class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcore.errors import FedcoreError, missing_extra

MOST_COMPONENTS = 3
"""Components of a class at most, as in the authors' code."""

VARIANCE_FLOOR = 1e-5
"""Added to every variance of a fit, as in the authors' code."""

# Of responsibilities that sum to a whole number of examples.
_ROUNDING = 1e-6

SUM_TOLERANCE = 1e-4
"""How far mixture weights that travelled in fp32 may sum from one."""


@dataclass(frozen=True)
class ClassMixtures:
    """The classes of a client as mixtures of Gaussians with diagonal covariances, in fp64.

    Attributes:
        shares: ``(K,)`` the classes' shares of the client's data, summing to one.
        sizes: ``(K,)`` number of components of each class.
        weights: ``(T,)`` of all components, class after class, summing to one in each.
        means, deviations: ``(T, D)``; ``deviations`` are standard deviations.
        encoder: the client's digest of its encoder, empty if it sent none.
    """

    shares: NDArray[np.float64]
    sizes: NDArray[np.int64]
    weights: NDArray[np.float64]
    means: NDArray[np.float64]
    deviations: NDArray[np.float64]
    encoder: bytes = b""


def fit_class_mixtures(
    features: Tensor,
    labels: Tensor,
    seed: int,
    min_per_component: int,
    share_counts: bool = False,
) -> dict[str, Tensor]:
    """Fit ``G_c = min(3, floor(n_c / min_per_component))`` Gaussians to each class of a client.

    Fewer where a component would rest on less than ``min_per_component`` examples, counted by their
    responsibilities: it would reveal them. A class with ``G_c = 0`` is left out. Classes are
    numbered in the order of their labels, which themselves are not sent: distances between clients
    do not need them.

    Args:
        features: ``(n, D)`` finite, from the frozen encoder.
        labels: ``(n,)`` integers.
        seed: draws the starts of the fits.
        min_per_component: examples that stand behind every component, at least.
        share_counts: send the number of examples of every class as well.

    Returns:
        ``weights (T,)``, ``means (T, D)``, ``variances (T, D)`` in fp32, ``classes (T,)`` int64
        and, if asked for, ``counts (K,)`` int64; nothing at all when no class is large enough.

    Raises:
        FedcoreError: features or labels of the wrong shape or type, or not finite.
        MissingExtraError: scikit-learn is not installed.
    """
    _check_examples(features, labels)
    points, kinds = features.double().cpu().numpy(), labels.cpu().numpy()
    parts: dict[str, list[NDArray[np.float64]]] = {"weights": [], "means": [], "variances": []}
    classes: list[int] = []
    counts: list[int] = []
    for place, label in enumerate(np.unique(kinds)):
        examples = points[kinds == label]
        if len(examples) < min_per_component:
            continue
        (state,) = np.random.SeedSequence((seed, place)).generate_state(1)
        mixture = _fit_class(examples, int(state), min_per_component)
        for name, values in mixture.items():
            parts[name].append(values)
        classes += [len(counts)] * len(mixture["weights"])
        counts.append(len(examples))
    if not counts:
        return {}
    statistics = {name: torch.from_numpy(np.concatenate(p)).float() for name, p in parts.items()}
    statistics["classes"] = torch.tensor(classes, dtype=torch.int64)
    if share_counts:
        statistics["counts"] = torch.tensor(counts, dtype=torch.int64)
    return statistics


def _fit_class(
    points: NDArray[np.float64], seed: int, min_per_component: int
) -> dict[str, NDArray[np.float64]]:
    """The largest mixture of ``points (n, D)`` whose components all rest on enough of them."""
    try:
        from sklearn.mixture import GaussianMixture
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise missing_extra("scikit-learn", "run") from None
    least = min_per_component / len(points) * (1 - _ROUNDING)
    for components in range(min(MOST_COMPONENTS, len(points) // min_per_component), 1, -1):
        mixture = GaussianMixture(
            components, covariance_type="diag", reg_covar=VARIANCE_FLOOR, random_state=seed
        )
        # Its k-means adds what several threads found in the order in which they finish.
        with threadpool_limits(1, user_api="openmp"):
            fit = mixture.fit(points)
        if fit.weights_.min() >= least:
            return {"weights": fit.weights_, "means": fit.means_, "variances": fit.covariances_}
    return {
        "weights": np.ones(1),
        "means": points.mean(0, keepdims=True),
        "variances": points.var(0, keepdims=True) + VARIANCE_FLOOR,
    }


def read_class_mixtures(
    statistics: Mapping[str, Tensor], client_id: str | None = None
) -> ClassMixtures:
    """The mixtures that a client sent, checked; rounding of the weights' sum is divided out.

    Classes whose sizes were not sent have equal shares.

    Args:
        client_id: whom errors name, where the caller does not.

    Raises:
        FedcoreError: naming the client and the value: a tensor is missing or of the wrong shape,
            weights are negative or do not sum to one, a variance is not positive, classes are not
            numbered 0, 1, ... in order, or a count is not positive.
    """
    who = "its statistics" if client_id is None else f"client {client_id}: its statistics"
    for name in ("weights", "means", "variances", "classes"):
        if name not in statistics:
            raise FedcoreError(f"{who} lack {name!r}; they hold {sorted(statistics)}")
    weights, means, variances = (
        statistics[name].double().cpu().numpy() for name in ("weights", "means", "variances")
    )
    classes = statistics["classes"].cpu().numpy()
    if classes.dtype.kind not in "iu":
        raise FedcoreError(f"{who} have classes of dtype {classes.dtype}; pass whole numbers")
    shape = means.shape
    if means.ndim != 2 or not means.size or variances.shape != shape:
        raise FedcoreError(
            f"{who} have means {shape} and variances {variances.shape}; both must be (T, D)"
        )
    if weights.shape != shape[:1] or classes.shape != shape[:1]:
        raise FedcoreError(
            f"{who} have {shape[0]} means, weights {weights.shape} and classes {classes.shape}"
        )
    if not np.isfinite(means).all():
        raise FedcoreError(f"{who} hold a mean that is not finite")
    if not (np.isfinite(variances).all() and (variances > 0).all()):
        worst = float(variances.min())
        raise FedcoreError(f"{who} hold a variance of {worst:g}; all must be finite and above 0")
    ordered, sizes = np.unique(classes, return_counts=True)
    if not np.array_equal(classes, np.repeat(np.arange(len(ordered)), sizes)):
        raise FedcoreError(f"{who} have classes {classes.tolist()}; number them 0, 1, ... in order")
    totals = np.bincount(classes, weights)
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise FedcoreError(f"{who} hold a mixture weight of {float(weights.min()):g}; pass >= 0")
    if (np.abs(totals - 1) > SUM_TOLERANCE).any():
        worst = float(totals[np.abs(totals - 1).argmax()])
        raise FedcoreError(f"{who} have mixture weights of a class that sum to {worst:g}, not to 1")
    encoder = statistics.get("encoder")
    return ClassMixtures(
        shares=_shares(statistics.get("counts"), len(ordered), who),
        sizes=sizes,
        weights=weights / totals[classes],
        means=means,
        deviations=np.sqrt(variances),
        encoder=b"" if encoder is None else encoder.cpu().numpy().tobytes(),
    )


def check_comparable(mixtures: Mapping[str, ClassMixtures]) -> None:
    """Refuse mixtures, by client id, of features of different encoders: they have no distance.

    Raises:
        FedcoreError: naming the first client that differs from the first of all.
    """
    first, *others = mixtures
    size, encoder = mixtures[first].means.shape[1], mixtures[first].encoder
    for client in others:
        if mixtures[client].means.shape[1] != size:
            raise FedcoreError(
                f"client {client}: its statistics are of {mixtures[client].means.shape[1]} "
                f"features, those of client {first} of {size}; all clients need one encoder"
            )
        if mixtures[client].encoder != encoder:
            raise FedcoreError(
                f"client {client}: its statistics come from another encoder than those of client "
                f"{first} (the digests differ); all clients need one encoder"
            )


def _shares(counts: Tensor | None, classes: int, who: str) -> NDArray[np.float64]:
    if counts is None:
        return np.full(classes, 1 / classes)
    sizes = counts.double().cpu().numpy()
    if sizes.shape != (classes,) or not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise FedcoreError(
            f"{who} have counts {sizes.tolist()}; pass a positive one for each of {classes} classes"
        )
    return np.asarray(sizes / sizes.sum())


def _check_examples(features: Tensor, labels: Tensor) -> None:
    if features.dim() != 2 or not features.is_floating_point():
        raise FedcoreError(
            f"features are {features.dtype} of shape {tuple(features.shape)}; pass floats (n, D)"
        )
    if labels.shape != features.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise FedcoreError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; pass "
            f"{features.shape[0]} integers"
        )
    if not bool(torch.isfinite(features).all()):
        raise FedcoreError("features hold a value that is not finite")
