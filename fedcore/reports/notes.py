"""What a reader must know before believing a number: one sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedcore.reports.comparison import RunGroup, below_majority, common_target
from fedcore.reports.formatting import megabytes, plural, rate, scientific, significant
from fedcore.reports.intervals import CONFIDENCE
from fedcore.reports.record import RunRecord

_FEW_EXAMPLES = 30
_PLURAL = {"accuracy": "accuracies", "perplexity": "perplexities"}


def run_outcome(record: RunRecord) -> str:
    """The run in one sentence."""
    done = len(record.trained)
    clients = len(record.partition.client_ids)
    if record.quality is None or not record.evaluated:
        return f"No round has been evaluated yet; {plural(done, 'round')} completed."
    up, down = record.cumulated[record.rounds[-1].index] if record.rounds else (None, None)
    sent = ""
    if up is not None and down is not None and up.total + down.total:
        sent = (
            f", having sent {megabytes(up.adapter + down.adapter)} MB of adapter and "
            f"{megabytes(up.head + down.head)} MB of head up and down"
        )
    measured = record.evaluated[-1][0].done
    late = "" if measured == done else f" (last measured after round {measured})"
    return (
        f"After {plural(done, 'round')} with {plural(clients, 'client')}, held-out "
        f"{record.measure.name} is {rate(record.quality)}{late}{sent}."
    )


def run_notes(record: RunRecord) -> list[str]:
    """The caveats of one run."""
    return list(_run_notes(record))


def _run_notes(record: RunRecord) -> Iterator[str]:
    s, done, name = record.summary, len(record.trained), record.measure.name
    if not s.finished:
        so_far = (
            f"{done} of {s.rounds} planned rounds" if s.rounds > done else plural(done, "round")
        )
        yield f"This run is not finished: every number is as of {so_far}."
    if record.interrupted_line:
        yield "The last line of metrics.jsonl was cut off and is left out."
    seed = "an unknown seed" if s.seed is None else f"seed {s.seed}"
    yield (
        f"One run, {seed}: it says nothing about the spread over seeds, so compare methods on "
        "several seeds."
    )
    majority = record.majority_rate
    if record.quality is not None and majority is not None and record.quality <= majority:
        yield (
            f"Failed: the accuracy {rate(record.quality)} is no better than always naming the most "
            f"frequent class of the clients' held-out examples ({rate(majority)})."
        )
    best = record.best_quality
    if None not in (best, record.quality) and best != record.quality:
        yield (
            f"The best {name}, {rate(best)}, is picked on the data it is measured on; "
            "quote the final one."
        )
    if record.target is not None and s.rounds_to_target is None and s.finished:
        yield f"The target {name} {rate(record.target)} was not reached."
    yield from _private(record)
    yield from _dropped_and_flagged(record)
    fewest = record.partition.smallest_test
    if fewest is not None and fewest < _FEW_EXAMPLES and record.client_evaluated:
        yield (
            f"The smallest held-out shard of a client has {plural(fewest, 'example')}: the "
            f"{_PLURAL[name]} of single clients, and the worst client's most of all, are coarse."
        )
    if record.not_finite:
        yield f"{plural(record.not_finite, 'number')} in the run folder were NaN or infinite."
    if record.commit is None:
        yield "The commit of the code is not recorded."
    elif record.commit.endswith("+"):
        yield "The code had uncommitted changes."


def _private(record: RunRecord) -> Iterator[str]:
    spent, central = record.privacy, record.central_privacy
    if spent is not None and spent.largest is not None:
        client, epsilon = spent.largest
        yield (
            f"Differential privacy of single examples: {client} has spent the most, epsilon "
            f"{significant(epsilon)} at delta {scientific(spent.delta)} (accountant "
            f"{spent.accountant}, noise multiplier {significant(spent.noise_multiplier)}, "
            f"gradients clipped to norm {significant(spent.max_grad_norm)}). It covers uploads and "
            "models, not the losses, accuracies and numbers of examples in this record."
        )
    if central is not None:
        yield (
            f"Differential privacy of whole clients, who trust the server: epsilon "
            f"{significant(central.epsilon)} at delta {scientific(central.delta)} (accountant "
            f"{central.accountant}, noise multiplier {significant(central.noise_multiplier)}, "
            f"updates clipped to norm {significant(central.max_norm)}). It covers the models that "
            "are sent out, not this record."
        )
    if "seeded" in {kind.noise for kind in (spent, central) if kind is not None}:
        yield (
            "The noise follows from the run's seed: whoever knows the seed can take it away, so "
            "the epsilon is that of the same run with secret noise."
        )


def _dropped_and_flagged(record: RunRecord) -> Iterator[str]:
    if record.dropped:
        cases = ", ".join(
            f"{client} ({reason}{f', {times} times' if times > 1 else ''})"
            for (client, reason), times in record.dropped.items()
        )
        uploads = plural(record.dropped.total(), "upload")
        verb = "was" if record.dropped.total() == 1 else "were"
        yield f"{uploads} {verb} left out of the aggregate: {cases}."
    for flag, times in record.flags.items():
        yield f"The method reported in {plural(times, 'round')}: {flag}."


def comparison_notes(groups: Sequence[RunGroup]) -> list[str]:
    """The caveats of a comparison."""
    return list(_comparison_notes(groups))


def _comparison_notes(groups: Sequence[RunGroup]) -> Iterator[str]:
    runs = [run for group in groups for run in group.runs]
    yield (
        f"Intervals are {CONFIDENCE:.0%} Student-t intervals of the mean over seeds. They cover "
        "what the seed changes and nothing else; overlapping intervals are not a test."
    )
    single = [group.label for group in groups if len(group.runs) == 1]
    if single:
        yield f"A single run, hence no interval: {', '.join(single)}."
    waiting = [run.folder.name for group in groups for run in group.unfinished]
    if waiting:
        yield f"Not finished and left out of every number: {', '.join(waiting)}."
    failed = [group.label for group in groups if below_majority(group)]
    if failed:
        yield f"Failed, no better than always naming the most frequent class: {', '.join(failed)}."
    seeds = {tuple(sorted(str(run.summary.seed) for run in g.runs)) for g in groups if g.runs}
    if len(seeds) > 1:
        yield "The methods were not run on the same seeds."
    if runs and common_target(groups) is None:
        yield "The runs do not share one target accuracy, so rounds to target are not compared."
    recipes = sorted({run.summary.recipe for run in runs})
    if len(recipes) > 1:
        yield f"The runs come from different recipes: {', '.join(recipes)}."
    commits = {str(run.commit) for run in runs}
    if len(commits) > 1:
        yield "The runs were made with different commits of the code."
    dropped = {g.label: sum(run.dropped.total() for run in g.runs) for g in groups}
    dropped = {label: count for label, count in dropped.items() if count}
    if dropped:
        cases = ", ".join(f"{count} of {label}" for label, count in dropped.items())
        yield f"Uploads left out of aggregates: {cases}."
