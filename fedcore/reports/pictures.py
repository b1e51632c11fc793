"""Which figures a page shows, and what it says under them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedcore.reports.comparison import RunGroup, group_measure
from fedcore.reports.document import Picture
from fedcore.reports.plots import (
    aggregation_error,
    client_spread,
    compared_by_bytes,
    compared_by_round,
    factor_drift,
    final_quality,
    partition_picture,
    quality_by_bytes,
    quality_by_round,
)
from fedcore.reports.plots.comparison import MOST_DIRECT
from fedcore.reports.record import RunRecord


def run_pictures(record: RunRecord) -> Iterator[Picture]:
    """The figures that the record has data for, in the order of the page."""
    name = record.measure.name
    if record.evaluated:
        yield Picture(
            f"{name}-by-round",
            f"Held-out {name} and loss of the global model; round 0 is the initial model.",
            quality_by_round(record),
        )
        up, down = record.cumulated[record.evaluated[-1][0].index]
        if up.total + down.total:
            yield Picture(
                f"{name}-by-bytes",
                f"Held-out {name} against bytes sent, up and down, summed over clients. MB = 10⁶ "
                "bytes.",
                quality_by_bytes(record),
            )
    if record.client_evaluated:
        yield Picture(
            "clients",
            f"{name.capitalize()} on the clients' own held-out shards. Above: from worst to best "
            "client, and the unweighted mean. Below: each client with the new global model and "
            "with its own model after local training, before aggregation.",
            client_spread(record),
        )
    if _defined(record, "aggregation_error"):
        yield Picture(
            "aggregation-error",
            "Distance of the broadcast product to the exact weighted mean of the clients' "
            "products, relative to that mean. Below: every adapted module, one column per round.",
            aggregation_error(record),
        )
    if _defined(record, "factor_drift"):
        yield Picture(
            "factor-drift",
            "How far the factors moved in each round, relative to their size before it. Below: "
            "every adapted module, one column per round.",
            factor_drift(record),
        )
    if record.partition.client_ids and record.partition.label_names:
        yield Picture(
            "partition",
            "Training examples by client and class, as areas; above, all of a client's examples.",
            partition_picture(record),
        )


def comparison_pictures(groups: Sequence[RunGroup]) -> Iterator[Picture]:
    """The figures that the finished runs have data for, in the order of the page."""
    runs = [run for group in groups for run in group.runs]
    name = group_measure(groups).name
    if any(run.summary.quality is not None for run in runs):
        yield Picture(
            f"final-{name}",
            f"Final held-out {name}: mean over seeds, 95% Student-t interval, and a tick for each "
            "seed. A hollow dot is a single run, which has no interval.",
            final_quality(groups),
        )
    if all(run.evaluated for run in runs) and runs:
        band = (
            "The band is the 95% Student-t interval over seeds."
            if len(groups) <= MOST_DIRECT
            else "Intervals are left out here for legibility."
        )
        yield Picture(
            f"{name}-by-round",
            f"Mean held-out {name} against rounds. {band}",
            compared_by_round(groups),
        )
        if any(run.summary.bytes_up.adapter + run.summary.bytes_down.adapter for run in runs):
            yield Picture(
                f"{name}-by-bytes",
                f"Mean held-out {name} against adapter bytes, up and down, summed over clients; "
                f"heads are not counted. {band}",
                compared_by_bytes(groups),
            )


def _defined(record: RunRecord, quantity: str) -> bool:
    return any(r.module_values(quantity) for r in record.trained)
