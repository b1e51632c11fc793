"""What a summary says that follows from the rounds alone, of a run that is finished or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedcore.federation.measures import Measure
from fedcore.federation.records import NO_TRAFFIC, PrivacySpent, PrivacySummary, Round


def outcome(rounds: Sequence[Round], measure: Measure, target: float | None) -> dict[str, Any]:
    """The fields of :class:`~fedcore.federation.records.Summary` that follow from its rounds.

    Args:
        rounds: those that are complete, the initial one included; maybe none.
        measure: the run's.
        target: the quality that rounds and bytes are counted up to.
    """
    evaluated = [r for r in rounds if r.accuracy is not None]
    last = evaluated[-1] if evaluated else None
    qualities = [(r.index, q) for r in evaluated if (q := r.quality(measure)) is not None]
    spread = last.client_qualities(measure) if last else []
    seconds: dict[str, float] = {}
    for phase, value in (item for r in rounds for item in r.seconds.items()):
        seconds[phase] = seconds.get(phase, 0.0) + value
    reached = None
    if target is not None:
        reached = next((t for t, q in qualities if t >= 0 and measure.reaches(q, target)), None)
    until = [r for r in rounds if reached is not None and r.index <= reached]
    sent = sum(r.bytes_up.total + r.bytes_down.total for r in until)
    privacy = rounds[-1].privacy if rounds else None
    return {
        "accuracy": last.accuracy if last else None,
        "loss": last.loss if last else None,
        measure.name: last.quality(measure) if last else None,
        f"best_{measure.name}": measure.best([q for _, q in qualities]),
        "worst_client": measure.worst(spread),
        "mean_client": sum(spread) / len(spread) if spread else None,
        "best_client": measure.best(spread),
        "bytes_up": sum((r.bytes_up for r in rounds), NO_TRAFFIC),
        "bytes_down": sum((r.bytes_down for r in rounds), NO_TRAFFIC),
        "seconds": seconds,
        "privacy": _with_largest(privacy) if privacy else None,
        "central_privacy": rounds[-1].central_privacy if rounds else None,
        f"target_{measure.name}": target,
        "rounds_to_target": None if reached is None else reached + 1,
        "bytes_to_target": None if reached is None else sent,
    }


def _with_largest(privacy: PrivacySpent) -> PrivacySummary:
    client, epsilon = privacy.largest or (None, None)
    # What was not recorded is not recorded here either.
    recorded = {name: getattr(privacy, name) for name in privacy.model_fields_set}
    return PrivacySummary(**recorded, largest_epsilon=epsilon, largest_epsilon_client=client)
