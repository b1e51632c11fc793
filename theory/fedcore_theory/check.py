"""What a check is: a claim, data, a measurement beside its bound, and a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Verdict = Literal["holds", "erratum", "artefact"]
"""What a check establishes.

``holds``: the claim, with the constants that the check states. ``erratum``: the claim as printed
fails, and the check measures by how much. ``artefact``: the quantity that the claim is about comes
from how it was measured, and vanishes or appears with a choice that changes no model.
"""

Relation = Literal["<=", "<", ">=", ">", "within"]

Case = TypeVar("Case")


@dataclass(frozen=True)
class Measured:
    """A number beside its bound.

    Attributes:
        what: the quantity, in words a table can show.
        value: what was measured; NaN satisfies no bound.
        relation: how ``value`` is to stand to ``bound``.
        bound: a number; for ``within`` the lowest and the highest value allowed.
    """

    what: str
    value: float
    relation: Relation
    bound: float | tuple[float, float]

    def __post_init__(self) -> None:
        if (self.relation == "within") != isinstance(self.bound, tuple):
            raise ValueError(f"{self.what}: relation {self.relation!r} with bound {self.bound!r}")
        # NumPy's numbers would turn `holds` into one of NumPy's, which JSON does not know.
        bound = self.bound
        plain = tuple(map(float, bound)) if isinstance(bound, tuple) else float(bound)
        object.__setattr__(self, "value", float(self.value))
        object.__setattr__(self, "bound", plain)

    @property
    def holds(self) -> bool:
        """Whether the value stands to its bound as it should."""
        if isinstance(self.bound, tuple):
            return self.bound[0] <= self.value <= self.bound[1]
        return {
            "<=": self.value <= self.bound,
            "<": self.value < self.bound,
            ">=": self.value >= self.bound,
            ">": self.value > self.bound,
        }[self.relation]


@dataclass(frozen=True)
class Outcome:
    """What a check measured.

    Attributes:
        measured: numbers and bounds, the one that the check is about first; all are to hold.
        samples: how many independent cases stand behind the numbers, in words.
        excludes: for a statistical claim, the probability that a true one fails this check, or the
            rate of violations that the sample excludes, in words.
        curves: what the picture shows, by name.
    """

    measured: tuple[Measured, ...]
    samples: str
    excludes: str = ""
    curves: Mapping[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether every number stands to its bound as it should."""
        return bool(self.measured) and all(one.holds for one in self.measured)


@dataclass(frozen=True)
class Check(Generic[Case]):
    """A claim that a computer can test in seconds.

    Attributes:
        id: short and unique, such as ``"R3"``.
        title: a few words.
        claim: what is said to be true, with its formula, in our words.
        source: who says so: a paper with its arXiv id and place, or ``"ours"``.
        verdict: what the check establishes.
        assumptions: under which the claim is made.
        data: the generator in words, sizes and seeds included.
        draw: a seed to one case.
        measure: the cases, drawn one by one as needed, to the outcome. Implementations under test
            are its keyword arguments, with what is shipped as their defaults, so that a test can
            put a wrong one in their place.
        picture: the outcome to a figure.
        repetitions: the number of cases by default, with consecutive seeds.
        first_seed: the seed of the first.
        derivation: what is our own: how a bound was found, tightened or repaired.
        finding: what a reader should take away; for an erratum, what is wrong and what is right.
    """

    id: str
    title: str
    claim: str
    source: str
    verdict: Verdict
    assumptions: str
    data: str
    draw: Callable[[int], Case]
    measure: Callable[..., Outcome]
    picture: Callable[[Outcome], Figure]
    repetitions: int = 1
    first_seed: int = 0
    derivation: str = ""
    finding: str = ""

    def run(self, repetitions: int | None = None, **implementations: Any) -> Outcome:
        """Measure on ``repetitions`` cases, with ``implementations`` in place of shipped ones.

        Raises:
            ValueError: fewer than one repetition.
        """
        return self.measure(self.cases(repetitions), **implementations)

    def cases(self, repetitions: int | None = None) -> Iterable[Case]:
        """The cases, drawn one after the other."""
        count = self.repetitions if repetitions is None else repetitions
        if count < 1:
            raise ValueError(f"repetitions is {count}; pass at least 1")
        return (self.draw(self.first_seed + n) for n in range(count))


def worst(values: Iterable[float]) -> float:
    """The largest value, NaN if any is NaN or there is none.

    ``max`` forgets a NaN that does not come first, and with it the failure that it stands for.
    """
    numbers = list(values)
    return math.nan if not numbers or any(math.isnan(value) for value in numbers) else max(numbers)


def least(values: Iterable[float]) -> float:
    """The smallest value, NaN if any is NaN or there is none."""
    return -worst(-value for value in values)
