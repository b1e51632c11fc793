"""Independent noise on A inflates the mean Gram, however many clients there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from fedcore_theory.check import Check, Measured, Outcome, worst
from fedcore_theory.figures import Line, trajectories
from fedcore_theory.models.gram_rounds import GramRound, gram_step
from fedcore_theory.rounds import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIENTS, RANK, WIDTH, NOISE = (1, 4, 16), 4, 100, 0.1
_SCALE = WIDTH * RANK * NOISE**2

Server = Callable[[GramRound], Array]


def draw(seed: int) -> list[GramRound]:
    """Clients that hold one A plus noise: 1, 4 and 16 of them, equal weights."""
    random = np.random.default_rng(seed)
    A = random.standard_normal((RANK, WIDTH))
    noise = NOISE * random.standard_normal((max(CLIENTS), RANK, WIDTH))
    return [GramRound(A, A + noise[:count], np.full(count, 1 / count)) for count in CLIENTS]


def shipped(method: str) -> Server:
    """A server by its name."""
    return lambda case: gram_step(method, case)


def measure(
    cases: Iterable[list[GramRound]],
    servers: Callable[[str], Server] = shipped,
    gram: Callable[[GramRound], Array] = lambda case: case.gram,
) -> Outcome:
    """The growth of the trace, in units of ``k r sigma^2``, over many draws."""
    growth: dict[str, list[list[float]]] = {"Q": [], "truncated": [], "avg_a": []}
    for rounds in cases:
        now = {
            "Q": [_growth(case, float(np.trace(gram(case)))) for case in rounds],
            "truncated": [_of(servers("florg.truncated"), case) for case in rounds],
            "avg_a": [_of(servers("florg.avg_a"), case) for case in rounds],
        }
        for name, values in now.items():
            growth[name].append(values)
    means = {name: np.mean(values, axis=0) for name, values in growth.items()}
    inverse = 1 / np.array(CLIENTS)
    predicted = {
        "Q": np.ones(len(CLIENTS)),
        "truncated": inverse + (1 - inverse) * RANK / WIDTH,
        "avg_a": inverse,
    }
    count = len(growth["Q"])
    # Without its cross term, one client's growth is a chi-square with k r degrees of freedom.
    error = np.sqrt(2 / (RANK * WIDTH) / count) * np.sqrt(inverse)
    apart = {name: np.abs(means[name] - predicted[name]) / error for name in means}
    return Outcome(
        measured=(
            Measured("standard errors between tr Q and its growth", worst(apart["Q"]), "<=", 5),
            Measured("standard errors, mean of A", worst(apart["avg_a"]), "<=", 5),
            Measured(
                "relative error of the growth, truncated",
                worst(np.abs(means["truncated"] / predicted["truncated"] - 1)),
                "<=",
                0.05 + 5 * np.sqrt(2 / (RANK * WIDTH) / count),
            ),
        ),
        samples=f"{count} draws of 1, 4 and 16 clients",
        excludes="a true claim fails with a probability of about 4e-6 (six numbers within 5 "
        "standard errors)",
        curves={"measured": means, "predicted": predicted},
    )


def _of(server: Server, case: GramRound) -> float:
    return _growth(case, float((server(case) ** 2).sum()))


def _growth(case: GramRound, trace: float) -> float:
    """The growth of the trace without ``2 <A, mean noise>``, whose mean is zero."""
    A = case.previous
    return (trace - (A**2).sum() - 2 * (A * (case.mean - A)).sum()) / _SCALE


def picture(outcome: Outcome) -> Figure:
    """Growth over the number of clients."""
    names = {"Q": "mean Gram Q", "truncated": "florg.truncated", "avg_a": "florg.avg_a"}
    measured, predicted = outcome.curves["measured"], outcome.curves["predicted"]
    lines = [Line(names[name], CLIENTS, growth) for name, growth in measured.items()]
    lines += [
        Line(f"{names[name]}, predicted", CLIENTS, growth, bound=True)
        for name, growth in predicted.items()
    ]
    return trajectories(lines, "clients", "growth of the trace / k r σ²", log_x=True)


CHECK = Check(
    id="G11",
    title="noise inflation",
    claim="If clients send A + sigma Z_n with independent standard normal Z_n, the trace of the "
    "mean Gram grows by k r sigma^2 in expectation, whatever their number; that of the mean of A "
    "grows by k r sigma^2 / N.",
    source="ours",
    verdict="holds",
    assumptions="Independent noise of equal size on all entries, equal weights.",
    data="r = 4, k = 100, sigma = .1, so k r sigma^2 = 4; 1, 4 and 16 clients; seeds 0 to 99",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=100,
    derivation="E tr (A + sigma Z)^T (A + sigma Z) = ||A||^2 + k r sigma^2. The expected excess "
    "of Q over the Gram of the mean is (1 - 1/N) r sigma^2 I; truncating Q to rank r keeps r of "
    "its k directions, which leaves the broadcast factor k r sigma^2 (1/N + (1 - 1/N) r / k) to "
    "first order.",
    finding="Noise, of privacy or of sampling, is a bias for Grams and an average for factors. "
    "Truncation to rank r removes most of it when k is far above r, but r^2 sigma^2 stays for "
    "any N.",
)
