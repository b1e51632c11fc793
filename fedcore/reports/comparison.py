"""Runs grouped by method, and what their seeds say together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedcore.errors import FedcoreError
from fedcore.federation.measures import Measure
from fedcore.federation.records import mean_or_none
from fedcore.reports.intervals import Estimate, estimate, median_until
from fedcore.reports.record import RunRecord

PARTS = ("adapter", "head")


@dataclass(frozen=True)
class RunGroup:
    """The runs of one method with one choice of the varied settings.

    Only ``runs``, the finished ones, enter any statistic.
    """

    method: str
    settings: Mapping[str, Any]
    runs: tuple[RunRecord, ...]
    unfinished: tuple[RunRecord, ...] = ()

    @property
    def label(self) -> str:
        """The method and the varied settings, each by the last part of its key."""
        settings = (f"{key.rpartition('.')[2]} {value}" for key, value in self.settings.items())
        return " · ".join([self.method, *settings])

    def over_seeds(self, value: Callable[[RunRecord], float | None]) -> Estimate:
        """The mean of ``value`` over the finished runs, with its interval."""
        return estimate([value(run) for run in self.runs])


def group_runs(
    records: Sequence[RunRecord], varied: Sequence[Mapping[str, Any]] | None = None
) -> tuple[RunGroup, ...]:
    """Group runs by method and varied settings, in order of first appearance.

    Args:
        records: The runs.
        varied: For each run, the recipe settings that differ between the runs; same keys in each.

    Raises:
        FedcoreError: no runs, runs of different measures, ``varied`` of another length or with
            other keys, or one group with the same seed twice, which would be counted as two
            independent runs.
    """
    if not records:
        raise FedcoreError("records is empty; pass at least one run")
    if len(measures := {record.measure.name for record in records}) > 1:
        raise FedcoreError(
            f"the runs are measured in {' and '.join(sorted(measures))}, which cannot be compared"
        )
    settings = [{} for _ in records] if varied is None else [dict(item) for item in varied]
    if len(settings) != len(records):
        raise FedcoreError(f"varied has {len(settings)} mappings for {len(records)} records")
    groups: dict[tuple[Any, ...], list[RunRecord]] = {}
    chosen: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for record, run_settings in zip(records, settings, strict=True):
        if run_settings.keys() != settings[0].keys():
            raise FedcoreError(
                f"{record.folder}: varied keys {[*run_settings]} are not {[*settings[0]]}"
            )
        key = (record.summary.method, *(repr(run_settings[name]) for name in settings[0]))
        for other in groups.setdefault(key, []):
            seed = record.summary.seed
            if seed is not None and seed == other.summary.seed:
                raise FedcoreError(
                    f"{other.folder} and {record.folder} are both {key[0]} with seed {seed}; "
                    "pass one of them"
                )
        groups[key].append(record)
        chosen[key] = {name: run_settings[name] for name in settings[0]}
    return tuple(
        RunGroup(
            method=key[0],
            settings=chosen[key],
            runs=tuple(r for r in runs if r.summary.finished),
            unfinished=tuple(r for r in runs if not r.summary.finished),
        )
        for key, runs in groups.items()
    )


def group_measure(groups: Sequence[RunGroup]) -> Measure:
    """What the quality of the runs is measured in; :func:`group_runs` saw that it is one."""
    return next(run.measure for group in groups for run in (*group.runs, *group.unfinished))


def common_target(groups: Sequence[RunGroup]) -> float | None:
    """The target quality that all runs share, or ``None`` if they do not."""
    targets = {run.target for group in groups for run in group.runs}
    return targets.pop() if len(targets) == 1 else None


def below_majority(group: RunGroup) -> bool:
    """Whether the mean final accuracy is no better than always naming the most frequent class."""
    accuracy = group.over_seeds(lambda r: r.quality).mean
    majority = group.over_seeds(lambda r: r.majority_rate).mean
    return accuracy is not None and majority is not None and accuracy <= majority


def _traffic(group: RunGroup) -> dict[str, float | None]:
    traffic: dict[str, float | None] = {}
    for direction in ("up", "down"):
        for part in PARTS:
            totals = [getattr(getattr(r.summary, f"bytes_{direction}"), part) for r in group.runs]
            shares = [
                total / run.client_rounds
                for total, run in zip(totals, group.runs, strict=True)
                if run.client_rounds
            ]
            total, share = mean_or_none(totals), mean_or_none(shares)
            name = f"{part}_mb_{direction}"
            traffic[name] = None if total is None else total / 1e6
            traffic[f"{name}_per_client_round"] = None if share is None else share / 1e6
    return traffic


def comparison_rows(
    records: Sequence[RunRecord], varied: Sequence[Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """One flat row, ready for JSON, for each method and choice of varied settings.

    Means are over the finished runs, one per seed; ``*_low`` and ``*_high`` bound the 95% Student-t
    interval and are ``None`` for a single run. Traffic is in units of 10⁶ bytes, summed over
    clients; per client-round it is divided by the clients selected, dropped ones included. ``gap``
    is local minus global quality on the clients' own held-out shards. ``rounds_to_target`` is the
    median, where a run that never reached the target counts as later than any other; it is
    ``None``, like ``target_accuracy``, if the runs do not share one target.

    Args:
        records: The runs.
        varied: For each run, the recipe settings that differ between the runs; same keys in each.

    Raises:
        FedcoreError: as :func:`group_runs`.
    """
    groups = group_runs(records, varied)
    target, measure = common_target(groups), records[0].measure
    rows = []
    for group in groups:
        row: dict[str, Any] = {"method": group.method, **group.settings}
        row["runs"], row["unfinished"] = len(group.runs), len(group.unfinished)
        row["seeds"] = ", ".join(str(run.summary.seed) for run in group.runs)
        row["measure"] = measure.name
        for name, value in {measure.name: _quality, **_MEASURED}.items():
            result = group.over_seeds(value)
            row[f"{name}_mean"], row[f"{name}_low"] = result.mean, result.low
            row[f"{name}_high"], row[f"{name}_half_width"] = result.high, result.half_width
        row["below_majority"] = below_majority(group)
        row |= _traffic(group)
        reached = [run.summary.rounds_to_target for run in group.runs]
        known = target is not None
        row[f"target_{measure.name}"] = target
        row["rounds_to_target"] = median_until(reached) if known else None
        row["target_reached"] = sum(r is not None for r in reached) if known else None
        row["aggregation_error"] = group.over_seeds(
            lambda r: r.mean_over_modules("aggregation_error")
        ).mean
        row["seconds"] = group.over_seeds(lambda r: sum(r.summary.seconds.values())).mean
        row["aggregate_seconds"] = group.over_seeds(
            lambda r: r.summary.seconds.get("aggregate")
        ).mean
        rows.append(row)
    return rows


def _quality(run: RunRecord) -> float | None:
    return run.quality


_MEASURED: dict[str, Callable[[RunRecord], float | None]] = {
    "worst_client": lambda run: run.summary.worst_client,
    "mean_client": lambda run: run.summary.mean_client,
    "gap": lambda run: run.gap,
}
