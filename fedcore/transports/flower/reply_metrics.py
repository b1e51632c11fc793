"""The numbers in clients' replies: read strictly, before Flower's own functions see them.

Flower's aggregators add up whatever stands in the metric records of all replies; one list where
others have a number, or one record too many, ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import INFO
from typing import Any

from flwr.app import Message, MetricRecord, RecordDict
from flwr.common.logger import log
from pydantic import ValidationError

from fedcore.data.validation import check_weight, one_number
from fedcore.errors import FedcoreError, printable
from fedcore.experiments.evaluation import SiteSums
from fedcore.federation.row_counts import RowCounts

Aggregate = Callable[[list[RecordDict], str], MetricRecord]
"""Flower's form of a function that makes one metric record of all."""

METRICS = "metrics"
"""The name under which the metrics of a reply stand once they are read."""

EXAMPLES = "num-examples"
"""The metric that holds a client's rows."""

TARGETS, CORRECT, LOSS_SUM = "targets", "correct", "loss-sum"
"""Metrics of a site's reply to an evaluation: sums over its held-out rows. The first is also that
of a client's training rows, where clients weigh by it.
"""

_ROWS = {f"rows-{name}": name for name in RowCounts.model_fields}
"""Metrics of what became of a client's rows, which its first reply has."""

_MOST = 100


def read_metrics(content: RecordDict) -> dict[str, float]:
    """All metrics of a reply by name, each one finite number.

    Raises:
        FedcoreError: naming the metric that is something else or is there twice, or too many.
    """
    metrics: dict[str, float] = {}
    for record in content.metric_records.values():
        for name, value in record.items():
            if name in metrics:
                raise FedcoreError(f"its {printable(name)} is there twice")
            if len(metrics) == _MOST:
                raise FedcoreError(f"its reply has more than {_MOST} metrics")
            metrics[name] = one_number(name, value)
    return metrics


def read_weight(metrics: Mapping[str, float], key: str) -> float:
    """The weight that a reply reports under ``key``.

    Raises:
        FedcoreError: it reports none.
    """
    if key not in metrics:
        raise FedcoreError(f"its reply does not say {key}")
    return metrics[key]


def read_sums(content: RecordDict, least: int) -> SiteSums | None:
    """A site's sums over its held-out rows; None where it sent none.

    Args:
        least: predictions that a site may answer for.

    Raises:
        FedcoreError: naming what is absent, or impossible.
    """
    metrics = read_metrics(content)
    if not metrics:
        return None
    values = {}
    for name in (EXAMPLES, TARGETS, CORRECT, LOSS_SUM):
        if name not in metrics:
            raise FedcoreError(f"its reply does not say {name}")
        value = metrics[name]
        if value < 0 or (name != LOSS_SUM and value != int(value)):
            raise FedcoreError(f"its {name} is {value:g}, which is not a sum of that kind")
        values[name] = value
    targets, correct = int(values[TARGETS]), int(values[CORRECT])
    if targets < least or correct > targets:
        raise FedcoreError(f"its reply says {correct} correct of {targets} targets")
    return SiteSums(int(values[EXAMPLES]), targets, correct, values[LOSS_SUM])


def metric_of(replies: Mapping[str, RecordDict], name: str) -> dict[str, float]:
    """The metric ``name`` by client, of those whose reply has it."""
    values = {}
    for client, content in replies.items():
        value = content.metric_records.get(METRICS, MetricRecord()).get(name)
        if isinstance(value, int | float):
            values[client] = float(value)
    return values


def row_metrics(counts: RowCounts) -> dict[str, int]:
    """``counts`` as metrics."""
    return {metric: getattr(counts, name) for metric, name in _ROWS.items()}


def read_row_counts(metrics: Mapping[str, float]) -> RowCounts | None:
    """What became of a client's rows, None where it does not say so.

    Raises:
        FedcoreError: its numbers are none of rows, or contradict each other.
    """
    if not set(_ROWS) <= set(metrics):
        return None
    values = {name: metrics[metric] for metric, name in _ROWS.items()}
    try:
        return RowCounts.model_validate(
            {n: int(v) if v == int(v) else v for n, v in values.items()}
        )
    except ValidationError:
        raise FedcoreError("its counts of rows contradict each other") from None


def with_metrics(content: RecordDict, metrics: Mapping[str, float]) -> RecordDict:
    """A reply with ``metrics`` in place of its metric records."""
    others: dict[str, Any] = {**content.array_records, **content.config_records}
    return RecordDict({**others, METRICS: MetricRecord(dict(metrics))})


def aggregated(
    aggregate: Aggregate,
    replies: Mapping[str, RecordDict],
    weights: Mapping[str, float],
    weight_key: str,
) -> MetricRecord | None:
    """What ``aggregate`` makes of the metrics that all clients report; None where there are none.

    Args:
        replies: client to its reply, as :func:`with_metrics` leaves it.
        weights: client to its positive weight, which stands under ``weight_key``.
    """
    if not weights:
        return None
    metrics = {client: read_metrics(replies[client]) for client in weights}
    common = set.intersection(*(set(record) for record in metrics.values())) - {weight_key}
    shown = [
        with_metrics(
            replies[client],
            {weight_key: weight, **{name: metrics[client][name] for name in sorted(common)}},
        )
        for client, weight in weights.items()
    ]
    return aggregate(shown, weight_key)


def read_evaluations(
    messages: Iterable[Message], weight_key: str
) -> tuple[dict[str, RecordDict], dict[str, float], dict[str, str]]:
    """Replies, weights and problems of an evaluation, by the names of their nodes.

    Nodes that sent an error, and those without an example, are left out.
    """
    replies: dict[str, RecordDict] = {}
    weights: dict[str, float] = {}
    problems: dict[str, str] = {}
    for message in messages:
        node = f"node-{message.metadata.src_node_id}"
        if message.has_error():
            continue
        try:
            metrics = read_metrics(message.content)
            weight = read_weight(metrics, weight_key)
            problem = "it replied twice" if node in replies else check_weight(weight)
        except FedcoreError as error:
            problem = str(error)
        except Exception as error:
            problem = f"its reply cannot be read ({type(error).__name__})"
        if problem:
            problems[node] = problem
        elif weight > 0:
            replies[node] = with_metrics(message.content, metrics)
            weights[node] = weight
    return replies, weights, problems


def log_replies(name: str, messages: Sequence[Message]) -> None:
    """Log how many replies came, and the errors among them, as Flower's own strategies do."""
    errors = [message for message in messages if message.has_error()]
    results = len(messages) - len(errors)
    log(INFO, "%s: Received %s results and %s failures", name, results, len(errors))
    for message in errors:
        node, reason = message.metadata.src_node_id, printable(message.error.reason)
        log(INFO, "\t> Received error in reply from node %d: %s", node, reason)
