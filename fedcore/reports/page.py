"""One self-contained HTML page a run, or a comparison of runs, and its figures as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcore.data.folders import write_files
from fedcore.federation.measures import Measure
from fedcore.reports import markup
from fedcore.reports.comparison import RunGroup, comparison_rows, group_measure, group_runs
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
from fedcore.reports.notes import comparison_notes, outcome, run_notes
from fedcore.reports.pictures import comparison_pictures, run_pictures
from fedcore.reports.plots import to_png
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
    pictures = list(run_pictures(record))
    title = f"{s.method} on {s.recipe}"
    seed = "" if s.seed is None else f", seed {s.seed}"
    body = [
        markup.header(f"Federated fine-tuning run{seed}", title, outcome(record)),
        markup.facts(_run_facts(record)),
        markup.notes(run_notes(record)),
        markup.section("Figures"),
        *(markup.picture(shown) for shown in pictures),
        markup.section("Tables"),
        final_grid(record).html(),
        run_grid(record).html(),
        *(sample_grid(shown).html() for shown in [record.sample] if shown),
        _environment(record).html(),
        markup.folded("Recipe", record.recipe),
    ]
    page = folder / "report.html"
    _write(page, markup.document(title, body), pictures)
    return page


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
    pictures = list(comparison_pictures(groups))
    recipes = ", ".join(dict.fromkeys(record.summary.recipe for record in records))
    methods = len({group.method for group in groups})
    title = f"{plural(methods, 'method')} on {recipes}"
    kind = f"Comparison of {plural(len(records), 'federated fine-tuning run')}"
    body = [
        markup.header(kind, title, _comparison_outcome(groups)),
        markup.notes(comparison_notes(groups)),
        outcome_grid(rows).html(),
        traffic_grid(rows).html(),
        markup.section("Figures"),
        *(markup.picture(shown) for shown in pictures),
        markup.section("Runs"),
        _runs(groups).html(),
        *(
            markup.folded(f"Recipe of {group.label}", group.runs[0].recipe)
            for group in groups
            if group.runs
        ),
    ]
    out = Path(out)
    _write(out, markup.document(title, body), pictures)
    return out


def _write(page: Path, text: str, pictures: Sequence[markup.Picture]) -> None:
    plots = {f"plots/{shown.name}.png": to_png(shown.figure) for shown in pictures}
    write_files(page.parent, {page.name: text.encode(), **plots})


def _run_facts(record: RunRecord) -> dict[str, tuple[str, str]]:
    s = record.summary
    measured = record.measure.name
    shown = {f"held-out {measured}": (rate(s.quality), f"best {rate(s.best_quality)}")}
    if s.worst_client is not None:
        spread = f"mean {rate(s.mean_client)}, best {rate(s.best_client)}"
        shown["worst client"] = (rate(s.worst_client), spread)
    if s.target is not None:
        reached = DASH if s.rounds_to_target is None else plural(s.rounds_to_target, "round")
        shown["to the target"] = (reached, f"{measured} {rate(s.target)}")
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
    for name, value in record.environment.items():
        flat |= value if isinstance(value, dict) else {name: value}
    rows = [
        (str(n), DASH if v is None else str(v))
        for n, v in {**flat, **record.summary.versions}.items()
    ]
    columns = (Column("", number=False), Column("", number=False))
    return Grid("Environment", columns, tuple(rows))


def _comparison_outcome(groups: Sequence[RunGroup]) -> str:
    found = [(g, g.over_seeds(lambda run: run.summary.quality)) for g in groups]
    ranked = [(g, e) for g, e in found if e.mean is not None]
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
            rate(run.summary.quality),
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
