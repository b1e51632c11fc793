"""Read a run folder.

A run folder holds ``recipe.toml``, ``environment.json``, ``partition.json``, ``metrics.jsonl`` (one
object a completed round, the initial model as round -1) and ``summary.json``, of a language model
also ``sample.json``, one with ``evaluation.tasks`` also ``answers.json``. A run that is still
going on, or was killed, has no summary or one that says so, and may end in half a line.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from fedcore.data.folders import OWN_LIMIT, read_regular
from fedcore.errors import FedcoreError
from fedcore.federation.answer_records import Answers
from fedcore.federation.measures import Measure, measure_of
from fedcore.federation.outcome import outcome
from fedcore.federation.record_files import AnyRecord, parse_json, validated
from fedcore.federation.records import Environment, PartitionRecord, Round, Sample, Summary
from fedcore.reports.record import RunRecord

__all__ = ["RunRecord", "read_run"]


def read_run(folder: str | Path) -> RunRecord:
    """Read and check a run folder; a run that has not finished is readable.

    Args:
        folder: The folder an engine wrote.

    Returns:
        The record. NaN and infinite numbers are ``None`` in it and counted in ``not_finite``. The
        outcome of a run that has not finished is derived from its rounds.

    Raises:
        FedcoreError: a file is missing or malformed; the message names the file, the line of
            ``metrics.jsonl``, and the field.
    """
    folder = Path(folder)
    recipe, settings = _recipe(folder / "recipe.toml")
    measure = measure_of(str(settings.get("task", "classification")))
    counts: list[int] = []

    def read(model: type[AnyRecord], name: str) -> AnyRecord:
        values, not_finite = parse_json(_bytes(folder / name), str(folder / name))
        counts.append(not_finite)
        return validated(model, values, str(folder / name))

    environment, partition = (
        read(Environment, "environment.json"),
        read(PartitionRecord, "partition.json"),
    )
    rounds, interrupted, not_finite = _rounds(folder / "metrics.jsonl")
    counts.append(not_finite)
    summary = _summary_of_recipe(settings, rounds, measure, folder.name)
    if (folder / "summary.json").exists():
        summary = read(Summary, "summary.json")
        if not summary.finished:
            so_far = outcome(rounds, measure, summary.target(measure))
            summary = summary.model_copy(update=so_far)
        elif measure.name not in summary.model_fields_set:
            raise FedcoreError(f"{folder / 'summary.json'}: field {measure.name!r} is missing")
    if interrupted and summary.finished:
        raise FedcoreError(
            f"{folder / 'metrics.jsonl'}: the last line is cut off, yet summary.json says finished"
        )
    return RunRecord(
        folder=folder,
        recipe=recipe,
        environment=environment,
        partition=partition,
        rounds=rounds,
        summary=summary,
        interrupted_line=interrupted,
        measure=measure,
        sample=read(Sample, "sample.json") if (folder / "sample.json").exists() else None,
        answers=read(Answers, "answers.json") if (folder / "answers.json").exists() else None,
        not_finite=sum(counts),
    )


def _bytes(path: Path) -> bytes:
    try:
        return read_regular(path, limit=OWN_LIMIT)
    except FileNotFoundError:
        raise FedcoreError(f"{path} is missing; {path.parent} is not a run folder") from None
    except OSError as error:
        raise FedcoreError(f"{path} cannot be read: {error}") from error


def _recipe(path: Path) -> tuple[str, dict[str, Any]]:
    """The text and what it says; of the keys, a report needs few, so any recipe is readable."""
    content = _bytes(path)
    try:
        return content.decode(), tomllib.loads(content.decode())
    except ValueError as error:
        raise FedcoreError(f"{path} is not TOML: {error}") from None


def _rounds(path: Path) -> tuple[tuple[Round, ...], bool, int]:
    """The rounds, whether the last line was cut off, and how many numbers were not finite."""
    rounds: list[Round] = []
    total, lines = 0, _bytes(path).split(b"\n")
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            values, not_finite = parse_json(line, where)
        except FedcoreError:
            # A finished line ends in a newline; text after the last newline was cut off.
            if number == len(lines):
                return tuple(rounds), True, total
            raise
        current = validated(Round, values, where)
        if rounds and current.index <= rounds[-1].index:
            raise FedcoreError(f"{where}: round {current.index} follows round {rounds[-1].index}")
        rounds.append(current)
        total += not_finite
    return tuple(rounds), False, total


def _summary_of_recipe(
    settings: dict[str, Any], rounds: tuple[Round, ...], measure: Measure, name: str
) -> Summary:
    """What recipe and rounds alone show of a run that has left no summary."""
    name, seed = settings.get("name", name), settings.get("seed")
    method, planned = settings.get("method"), settings.get("rounds")
    if isinstance(method, dict):
        method = method.get("name")
    return Summary(
        recipe=str(name),
        method=method if isinstance(method, str) else "unknown method",
        seed=seed if type(seed) is int else None,
        rounds=planned if type(planned) is int else sum(r.index >= 0 for r in rounds),
        finished=False,
        **outcome(rounds, measure, None),
    )
