"""The tables of a run and of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedcore.federation.measures import ACCURACY, PERPLEXITY
from fedcore.federation.records import Sample, mean_or_none
from fedcore.reports.comparison import comparison_rows
from fedcore.reports.formatting import (
    DASH,
    duration,
    megabytes,
    rate,
    scientific,
    signed,
    significant,
    with_half_width,
)
from fedcore.reports.grid import Column, Grid, stacked
from fedcore.reports.record import RunRecord

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

__all__ = [
    "comparison_markdown",
    "comparison_rows",
    "comparison_table",
    "final_grid",
    "final_table",
    "outcome_grid",
    "run_grid",
    "run_table",
    "sample_grid",
    "traffic_grid",
]

_ROUND_NOTE = (
    "Round 0 is the initial model. Clients: the global model on each client's own held-out shard; "
    "the mean is unweighted. MB = 10⁶ bytes since the start, summed over clients. Error and drift: "
    "mean over modules."
)

_OUTCOME_NOTE = (
    "± is the half-width of the 95% Student-t interval over seeds; a dash in its place means that "
    "one run has no interval. First column of qualities: on all held-out examples; where every "
    "client has a model of its own, the mean over these. Mean and worst client, local − global: on "
    "the clients' own held-out shards, last round. Rounds to target: median (runs that reached "
    "it). Error: mean over rounds and modules."
)

_SENSE = {
    ACCURACY.name: "",
    PERPLEXITY.name: (
        " Perplexity, the exponential of the mean loss of a token: lower is better, and a negative "
        "local − global says that the clients' own models are the better ones."
    ),
}

_FAILED_NOTE = " † failed: no better than always naming the most frequent class."

_TRAFFIC_NOTE = (
    "Up / down in MB = 10⁶ bytes, mean over runs. Total: summed over clients and rounds. Each: "
    "total divided by the clients selected in all rounds."
)


def run_grid(record: RunRecord) -> Grid:
    """One row per round in which the global model was evaluated."""
    rows, measure = [], record.measure
    # A language model has no head to send; empty columns would push figures off a terminal.
    heads = any(up.head or down.head for up, down in record.cumulated.values())
    for r in record.rounds:
        quality, at_clients = r.quality(measure), r.client_qualities(measure)
        if quality is None and not at_clients:
            continue
        up, down = record.cumulated[r.index]
        rows.append(
            (
                str(r.done),
                rate(quality),
                rate(r.loss),
                rate(measure.worst(at_clients)),
                rate(mean_or_none(at_clients)),
                rate(measure.best(at_clients)),
                megabytes(up.adapter),
                megabytes(down.adapter),
                *([megabytes(up.head), megabytes(down.head)] if heads else []),
                scientific(mean_or_none(r.module_values("aggregation_error"))),
                scientific(mean_or_none(r.module_values("factor_drift"))),
            )
        )
    headings = (
        *("round", measure.name, "loss", "worst", "mean", "best"),
        *("adapter\nMB\N{NO-BREAK SPACE}↑", "adapter\nMB\N{NO-BREAK SPACE}↓"),
        *(["head\nMB\N{NO-BREAK SPACE}↑", "head\nMB\N{NO-BREAK SPACE}↓"] if heads else []),
        *("error", "drift"),
    )
    columns = tuple(Column(heading) for heading in headings)
    return Grid("Rounds", columns, tuple(rows), _ROUND_NOTE + _SENSE[record.measure.name])


def final_grid(record: RunRecord) -> Grid:
    """The outcome, a row a quantity."""
    s, name = record.summary, record.measure.name
    phases = " · ".join(f"{phase} {duration(value)}" for phase, value in s.seconds.items())
    rows = [
        (f"held-out {name}", rate(record.quality)),
        (f"best {name} of any round", rate(record.best_quality)),
        (
            "clients: worst · mean · best",
            f"{rate(s.worst_client)} · {rate(s.mean_client)} · {rate(s.best_client)}",
        ),
        (f"local − global {name}", signed(record.gap)),
        ("adapter traffic", f"{megabytes(s.bytes_up.adapter)} ↑ / {_down(record)} ↓ MB"),
        (
            "head traffic",
            f"{megabytes(s.bytes_up.head)} ↑ / {megabytes(s.bytes_down.head)} ↓ MB",
        ),
        ("rounds to target", _target(record)),
        ("aggregation error", scientific(record.mean_over_modules("aggregation_error"))),
        ("factor drift", scientific(record.mean_over_modules("factor_drift"))),
        *_upload_error(record),
        *_epsilons(record),
        ("time", f"{duration(sum(s.seconds.values()))} ({phases})" if s.seconds else DASH),
        (
            "peak memory",
            DASH if s.peak_memory_bytes is None else f"{megabytes(s.peak_memory_bytes)} MB",
        ),
    ]
    title = f"{s.method} on {s.recipe}, seed {DASH if s.seed is None else s.seed}"
    if not s.finished:
        title += " (not finished)"
    return Grid(title, (Column("", number=False), Column("", number=False)), tuple(rows))


def sample_grid(sample: Sample) -> Grid:
    """One held-out text, continued by the model before and after training."""
    whose = f" of {sample.client}" if sample.client else ""
    rows = (
        ("given", sample.prompt),
        ("before", sample.before),
        (f"after{whose}", sample.after),
        ("the text itself", sample.reference),
    )
    columns = (Column("", number=False), Column("", number=False))
    note = "The likeliest token each time. One text shows what changed, not how good it is."
    return Grid(f"A held-out text ({sample.domain}), continued", columns, rows, note)


def _epsilons(record: RunRecord) -> list[tuple[str, str]]:
    rows = []
    spent, central = record.privacy, record.central_privacy
    if spent is not None and spent.largest is not None:
        client, epsilon = spent.largest
        at = f"delta {scientific(spent.delta)} ({client}, {spent.accountant})"
        rows.append(("largest epsilon of an example", f"{significant(epsilon)} at {at}"))
    if central is not None:
        at = f"delta {scientific(central.delta)} ({central.accountant})"
        rows.append(("epsilon of a whole client", f"{significant(central.epsilon)} at {at}"))
    return rows


def _upload_error(record: RunRecord) -> list[tuple[str, str]]:
    """A row where the number format of the uploads lost something."""
    lost = mean_or_none([r.upload_error for r in record.trained if r.upload_error is not None])
    return [("error of the uploads' number format", scientific(lost))] if lost else []


def _down(record: RunRecord) -> str:
    return megabytes(record.summary.bytes_down.adapter)


def _target(record: RunRecord) -> str:
    s = record.summary
    if record.target is None:
        return DASH
    if s.rounds_to_target is None:
        return f"{DASH} ({rate(record.target)} not reached)"
    return (
        f"{s.rounds_to_target} ({record.measure.name} {rate(record.target)}, "
        f"{megabytes(s.bytes_to_target)} MB)"
    )


def outcome_grid(rows: Sequence[Mapping[str, Any]]) -> Grid:
    """What the runs reached: the quality half of :func:`comparison_rows` as text."""
    cells = []
    name = rows[0]["measure"] if rows else ACCURACY.name
    for row in rows:
        unfinished = f" (+{row['unfinished']} unfinished)" if row["unfinished"] else ""
        cells.append(
            (
                *_names(row),
                f"{row['runs']}{unfinished}",
                with_half_width(rate(row[f"{name}_mean"]), row[f"{name}_half_width"]),
                rate(row["mean_client_mean"]),
                with_half_width(rate(row["worst_client_mean"]), row["worst_client_half_width"]),
                signed(row["gap_mean"]),
                _reached(row),
                scientific(row["aggregation_error"]),
                duration(row["seconds"]),
            )
        )
    headings = (
        *("runs", name, "mean\nclient", "worst client"),
        *("local −\nglobal", "rounds to\ntarget", "error"),
    )
    failed = _FAILED_NOTE * any(row["below_majority"] for row in rows)
    note = _OUTCOME_NOTE + _SENSE[name] + failed
    return Grid("Outcome", _columns(rows, *headings, "time"), tuple(cells), note)


def traffic_grid(rows: Sequence[Mapping[str, Any]]) -> Grid:
    """What the runs sent: the traffic half of :func:`comparison_rows` as text."""
    cells = [
        (
            *_names(row),
            *(
                f"{significant(row[f'{part}_mb_up{scope}'])} / "
                f"{significant(row[f'{part}_mb_down{scope}'])}"
                for part in ("adapter", "head")
                for scope in ("_per_client_round", "")
            ),
        )
        for row in rows
    ]
    headings = ("adapter each", "adapter total", "head each", "head total")
    return Grid("Traffic", _columns(rows, *headings), tuple(cells), _TRAFFIC_NOTE)


def _settings(row: Mapping[str, Any]) -> list[str]:
    names = list(row)
    return names[1 : names.index("runs")]


def _names(row: Mapping[str, Any]) -> tuple[str, ...]:
    method = f"{row['method']} †" if row["below_majority"] else str(row["method"])
    return (method, *(str(row[name]) for name in _settings(row)))


def _columns(rows: Sequence[Mapping[str, Any]], *headings: str) -> tuple[Column, ...]:
    names = ("method", *(_settings(rows[0]) if rows else ()))
    return (*(Column(name, number=False) for name in names), *(Column(name) for name in headings))


def _reached(row: Mapping[str, Any]) -> str:
    if row["target_reached"] is None:
        return DASH
    middle = row["rounds_to_target"]
    shown = DASH if middle is None else f"{middle:g}"
    return f"{shown} ({row['target_reached']} of {row['runs']})"


def run_table(record: RunRecord) -> Table:
    """The evaluated rounds, for the terminal."""
    return run_grid(record).rich()


def final_table(record: RunRecord) -> Table:
    """The outcome, for the terminal."""
    return final_grid(record).rich()


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Group:
    """The rows of :func:`comparison_rows`, for the terminal: outcome, then traffic."""
    return stacked(outcome_grid(rows), traffic_grid(rows))


def comparison_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of :func:`comparison_rows` as two Markdown tables, each with its note."""
    return "\n".join(
        f"### {grid.title}\n\n{grid.markdown()}\n{grid.note}\n"
        for grid in (outcome_grid(rows), traffic_grid(rows))
    )
