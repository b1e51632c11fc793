"""The self-contained HTML pages of a run and of a comparison, and their figures as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcore.federation.measures import Measure
from fedcore.reports.answers import answer_grids
from fedcore.reports.comparison import RunGroup, comparison_rows, group_measure, group_runs
from fedcore.reports.document import Page, PageSection, write_page
from fedcore.reports.formatting import (
    DASH,
    duration,
    megabytes,
    plural,
    rate,
    scientific,
    significant,
    with_half_width,
)
from fedcore.reports.grid import Column, Grid
from fedcore.reports.intervals import Estimate
from fedcore.reports.notes import comparison_notes, run_notes, run_outcome
from fedcore.reports.pictures import comparison_pictures, run_pictures
from fedcore.reports.reading import read_run
from fedcore.reports.record import RunRecord
from fedcore.reports.tables import (
    final_grid,
    outcome_grid,
    run_grid,
    sample_grid,
    traffic_grid,
)


def write_run_page(folder: str | Path) -> Path:
    """Write ``report.html`` and ``plots/*.png`` into a run folder, finished or not.

    Args:
        folder: A run folder, as :func:`fedcore.reports.reading.read_run` takes it.

    Returns:
        The page's path. The page needs no other file and no network.

    Raises:
        FedcoreError: as :func:`fedcore.reports.reading.read_run`; nothing is written then.
    """
    folder = Path(folder)
    record = read_run(folder)
    s = record.summary
    seed = "" if s.seed is None else f", seed {s.seed}"
    samples = [sample_grid(record.sample)] if record.sample else []
    answered = answer_grids(record.answers) if record.answers else ()
    page = Page(
        kind=f"Federated fine-tuning run{seed}",
        title=f"{s.method} on {s.recipe}",
        outcome=run_outcome(record),
        facts=_run_facts(record),
        notes=run_notes(record),
        sections=(
            PageSection("Figures", pictures=list(run_pictures(record))),
            PageSection(
                "Tables",
                tables=[
                    final_grid(record),
                    *answered,
                    run_grid(record),
                    *samples,
                    _environment(record),
                ],
                folded=[("Recipe", record.recipe)],
            ),
        ),
    )
    return write_page(page, folder / "report.html")


def write_comparison_page(
    records: Sequence[RunRecord],
    out: str | Path,
    varied: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Write a page that compares runs, and its figures into ``plots/`` beside it.

    Args:
        records: The runs.
        out: The HTML file to write.
        varied: For each run, the recipe settings that differ between the runs; same keys in each.

    Returns:
        The page's path. The page needs no other file and no network.

    Raises:
        FedcoreError: as :func:`fedcore.reports.comparison.group_runs`; nothing is written then.
    """
    groups = group_runs(records, varied)
    rows = comparison_rows(records, varied)
    recipes = ", ".join(dict.fromkeys(record.summary.recipe for record in records))
    methods = len({group.method for group in groups})
    finished = [group for group in groups if group.runs]
    page = Page(
        kind=f"Comparison of {plural(len(records), 'federated fine-tuning run')}",
        title=f"{plural(methods, 'method')} on {recipes}",
        outcome=_comparison_outcome(groups),
        notes=comparison_notes(groups),
        sections=(
            PageSection(tables=[outcome_grid(rows), traffic_grid(rows)]),
            PageSection("Figures", pictures=list(comparison_pictures(groups))),
            PageSection(
                "Runs",
                tables=[_runs(groups)],
                folded=[(f"Recipe of {g.label}", g.runs[0].recipe) for g in finished],
            ),
        ),
    )
    return write_page(page, Path(out))


def _run_facts(record: RunRecord) -> dict[str, tuple[str, str]]:
    s = record.summary
    measured = record.measure.name
    shown = {f"held-out {measured}": (rate(record.quality), f"best {rate(record.best_quality)}")}
    if s.worst_client is not None:
        spread = f"mean {rate(s.mean_client)}, best {rate(s.best_client)}"
        shown["worst client"] = (rate(s.worst_client), spread)
    if record.target is not None:
        reached = DASH if s.rounds_to_target is None else plural(s.rounds_to_target, "round")
        shown["to the target"] = (reached, f"{measured} {rate(record.target)}")
    for name, up, down in (
        ("adapter sent", s.bytes_up.adapter, s.bytes_down.adapter),
        ("head sent", s.bytes_up.head, s.bytes_down.head),
    ):
        shown[name] = (f"{megabytes(up + down)} MB", f"↑ {megabytes(up)} ↓ {megabytes(down)}")
    if record.privacy is not None and record.privacy.largest is not None:
        client, epsilon = record.privacy.largest
        at = f"{client}, at delta {scientific(record.privacy.delta)}"
        shown["largest epsilon"] = (significant(epsilon), at)
    if record.central_privacy is not None:
        at = f"whole clients, at delta {scientific(record.central_privacy.delta)}"
        shown["central epsilon"] = (significant(record.central_privacy.epsilon), at)
    aggregate = s.seconds.get("aggregate")
    shown["time"] = (
        duration(sum(s.seconds.values()) if s.seconds else None),
        "" if aggregate is None else f"aggregation {duration(aggregate)}",
    )
    return shown


def _environment(record: RunRecord) -> Grid:
    flat: dict[str, Any] = {}
    for name, value in sorted(record.environment.plain().items()):
        flat |= value if isinstance(value, dict) else {name: value}
    rows = [
        (str(n), DASH if v is None else str(v))
        for n, v in {**flat, **record.summary.versions}.items()
    ]
    columns = (Column("", number=False), Column("", number=False))
    return Grid("Environment", columns, tuple(rows))


def _comparison_outcome(groups: Sequence[RunGroup]) -> str:
    estimates = [(g, g.over_seeds(lambda run: run.quality)) for g in groups]
    ranked = [(g, e) for g, e in estimates if e.mean is not None]
    if not ranked:
        return "No run is finished yet."
    measure = group_measure(groups)
    sign = -1 if measure.lower_is_better else 1
    group, best = max(ranked, key=lambda item: sign * (item[1].mean or 0.0))
    quality = with_half_width(rate(best.mean), best.half_width)
    counted = plural(best.n, "seed") if best.half_width is not None else "one seed, no interval"
    if len(ranked) == 1:
        return f"{group.label} ends at held-out {measure.name} {quality} ({counted})."
    overlapping = sum(other is not group and not _clear(best, e, measure) for other, e in ranked)
    verdict = (
        f"its interval is not clear of {overlapping} of the {len(ranked) - 1} others"
        if overlapping
        else f"its interval lies {'below' if measure.lower_is_better else 'above'} all others'"
    )
    extreme = "Lowest" if measure.lower_is_better else "Highest"
    return f"{extreme} mean {measure.name}: {group.label}, {quality} ({counted}); {verdict}."


def _clear(best: Estimate, other: Estimate, measure: Measure) -> bool:
    """Whether the interval of the best lies on the good side of the other's, without touching."""
    worse, better = (best, other) if measure.lower_is_better else (other, best)
    return worse.high is not None and better.low is not None and worse.high < better.low


def _runs(groups: Sequence[RunGroup]) -> Grid:
    measured = group_measure(groups).name
    rows = [
        (
            run.folder.name,
            group.label,
            DASH if run.summary.seed is None else str(run.summary.seed),
            str(len(run.trained)),
            rate(run.quality),
            rate(run.summary.worst_client),
            "yes" if run.summary.finished else "no",
        )
        for group in groups
        for run in (*group.runs, *group.unfinished)
    ]
    columns = (
        *(Column(name, number=False) for name in ("folder", "method")),
        *(Column(name) for name in ("seed", "rounds", measured, "worst client", "finished")),
    )
    return Grid("Every run", columns, tuple(rows))
