"""Read a run folder.

A run folder holds ``recipe.toml``, ``environment.json``, ``partition.json``, ``metrics.jsonl`` (one
object a completed round, the initial model as round -1) and ``summary.json``, of a language model
also ``sample.json``. A run that is still
going on, or was killed, has no summary or one that says so, and may end in half a line.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedcore.errors import FedcoreError
from fedcore.federation.measures import Measure, measure_of
from fedcore.reports.fields import Fields
from fedcore.reports.record import (
    CentralPrivacySpent,
    ClientRound,
    DroppedClient,
    ModuleRound,
    Partition,
    PrivacySpent,
    RoundRecord,
    RunRecord,
    Sample,
    Summary,
    Traffic,
    mean_or_none,
)

__all__ = ["RunRecord", "read_run"]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FedcoreError(f"{path} is missing; {path.parent} is not a run folder") from None
    except OSError as error:
        raise FedcoreError(f"{path} cannot be read: {error}") from error


def _parse(text: bytes, where: str, undefined: list[str]) -> Any:
    """JSON with NaN and infinities as ``None``; each is noted in ``undefined``."""

    def absent(token: str) -> None:
        undefined.append(f"{where}: {token}")

    try:
        return json.loads(text, parse_constant=absent)
    except ValueError as error:
        raise FedcoreError(f"{where} is not JSON in UTF-8: {error}") from None


def _traffic(fields: Fields) -> Traffic:
    return Traffic(fields.count("adapter"), fields.count("head"))


def _client(fields: Fields, measure: Measure) -> ClientRound:
    return ClientRound(
        client=fields.text("client"),
        examples=fields.count("examples", 0),
        train_loss=fields.number("train_loss", None),
        global_accuracy=fields.number("global_accuracy", None),
        local_accuracy=fields.number("local_accuracy", None),
        global_loss=fields.number("global_loss", None),
        local_loss=fields.number("local_loss", None),
        measure=measure,
    )


def _privacy(fields: Fields) -> PrivacySpent:
    return PrivacySpent(
        epsilon=fields.numbers("epsilon"),
        delta=fields.number("delta"),
        accountant=fields.text("accountant"),
        noise_multiplier=fields.number("noise_multiplier"),
        max_grad_norm=fields.number("max_grad_norm"),
        noise=fields.text("noise"),
    )


def _central_privacy(fields: Fields) -> CentralPrivacySpent:
    return CentralPrivacySpent(
        epsilon=fields.number("epsilon"),
        delta=fields.number("delta"),
        accountant=fields.text("accountant"),
        noise_multiplier=fields.number("noise_multiplier"),
        max_norm=fields.number("max_norm"),
        noise=fields.text("noise"),
    )


def _module(fields: Fields) -> ModuleRound:
    return ModuleRound(
        module=fields.text("module"),
        aggregation_error=fields.number("aggregation_error", None),
        factor_drift=fields.number("factor_drift", None),
        kept_rank=fields.whole("kept_rank", None),
        condition=fields.number("condition", None),
    )


def _round(fields: Fields, measure: Measure) -> RoundRecord:
    index = fields.whole("round")
    if index is None or index < -1:
        raise fields.wrong("round", "a whole number >= -1")
    # The initial model is only evaluated; a trained round that lacks a field is a broken writer.
    absent: dict[str, Any] = {"default": []} if index < 0 else {}
    silent: dict[str, Any] = {"default": None} if index < 0 else {}
    nothing: dict[str, Any] = {"default": {"adapter": 0, "head": 0}} if index < 0 else {}
    clients = tuple(_client(c, measure) for c in fields.objects("clients", **absent))
    dropped = tuple(
        DroppedClient(d.text("client"), d.text("reason"))
        for d in fields.objects("dropped", **absent)
    )
    # Without a list of those sampled: the ones that trained, or were dropped.
    trained = {c.client for c in clients if index >= 0 and c.train_loss is not None}
    taking_part = sorted(trained | {d.client for d in dropped})
    return RoundRecord(
        index=index,
        accuracy=fields.number("accuracy"),
        loss=fields.number("loss"),
        train_loss=fields.number("train_loss", **silent),
        clients=clients,
        sampled=fields.names("sampled") if "sampled" in fields.values else tuple(taking_part),
        dropped=dropped,
        flags=fields.names("flags") if "flags" in fields.values else (),
        bytes_up=_traffic(fields.inner("bytes_up", **nothing)),
        bytes_down=_traffic(fields.inner("bytes_down", **nothing)),
        upload_error=fields.number("upload_error", None),
        seconds=fields.numbers("seconds", {}),
        modules=tuple(_module(m) for m in fields.objects("modules", **absent)),
        privacy=_privacy(fields.inner("privacy")) if fields.get("privacy", None) else None,
        central_privacy=(
            _central_privacy(fields.inner("central_privacy"))
            if fields.get("central_privacy", None)
            else None
        ),
        measure=measure,
    )


def _rounds(
    text: bytes, path: Path, undefined: list[str], measure: Measure
) -> tuple[tuple[RoundRecord, ...], bool]:
    rounds: list[RoundRecord] = []
    lines = text.split(b"\n")
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            values = _parse(line, where, undefined)
        except FedcoreError:
            # A finished line ends in a newline; text after the last newline was cut off.
            if number == len(lines):
                return tuple(rounds), True
            raise
        found = _round(Fields(values, where), measure)
        if rounds and found.index <= rounds[-1].index:
            raise FedcoreError(f"{where}: round {found.index} follows round {rounds[-1].index}")
        rounds.append(found)
    return tuple(rounds), False


def _partition(fields: Fields) -> Partition:
    labels, clients = fields.names("label_names"), fields.names("client_ids")
    size = (len(clients), len(labels))
    return Partition(
        label_names=labels,
        client_ids=clients,
        class_counts=fields.count_table("class_counts", *size),
        test_counts=fields.count_table("test_counts", *size),
    )


def _summary(fields: Fields, measure: Measure) -> Summary:
    finished = fields.get("finished")
    if not isinstance(finished, bool):
        raise fields.wrong("finished", "true or false")
    versions = fields.inner("versions", {})
    return Summary(
        recipe=fields.text("recipe"),
        method=fields.text("method"),
        seed=fields.whole("seed"),
        rounds=fields.count("rounds"),
        finished=finished,
        quality=fields.number(measure.name),
        best_quality=fields.number(f"best_{measure.name}", None),
        worst_client=fields.number("worst_client", None),
        mean_client=fields.number("mean_client", None),
        best_client=fields.number("best_client", None),
        bytes_up=_traffic(fields.inner("bytes_up")),
        bytes_down=_traffic(fields.inner("bytes_down")),
        seconds=fields.numbers("seconds", {}),
        peak_memory_bytes=fields.whole("peak_memory_bytes", None),
        git=None if fields.get("git", None) is None else fields.text("git"),
        versions={name: str(value) for name, value in versions.values.items()},
        target=fields.number(f"target_{measure.name}", None),
        rounds_to_target=fields.whole("rounds_to_target", None),
        bytes_to_target=fields.whole("bytes_to_target", None),
    )


def _derived_summary(
    rounds: tuple[RoundRecord, ...], recipe: str, folder: Path, measure: Measure
) -> Summary:
    """What the rounds alone tell of a run that has left no summary."""
    qualities = [r.quality for r in rounds if r.quality is not None]
    clients = next((found for r in reversed(rounds) if (found := r.client_qualities)), [])
    seconds: dict[str, float] = {}
    for phase, value in (item for r in rounds for item in r.seconds.items()):
        seconds[phase] = seconds.get(phase, 0.0) + value
    settings = tomllib.loads(recipe)
    name, method, seed = settings.get("name"), settings.get("method"), settings.get("seed")
    planned = settings.get("rounds")
    if isinstance(method, dict):
        method = method.get("name")
    return Summary(
        recipe=name if isinstance(name, str) else folder.name,
        method=method if isinstance(method, str) else "unknown method",
        seed=seed if type(seed) is int else None,
        rounds=planned if type(planned) is int else sum(r.index >= 0 for r in rounds),
        finished=False,
        quality=qualities[-1] if qualities else None,
        best_quality=measure.best(qualities),
        worst_client=measure.worst(clients),
        mean_client=mean_or_none(clients),
        best_client=measure.best(clients),
        bytes_up=sum((r.bytes_up for r in rounds), Traffic()),
        bytes_down=sum((r.bytes_down for r in rounds), Traffic()),
        seconds=seconds,
    )


def _sample(fields: Fields) -> Sample:
    return Sample(
        domain=fields.text("domain"),
        prompt=fields.text("prompt"),
        reference=fields.text("reference"),
        before=fields.text("before"),
        after=fields.text("after"),
        client=None if fields.get("client", None) is None else fields.text("client"),
    )


def _with_names(derived: Summary, written: Summary) -> Summary:
    """What an unfinished run's summary says of the job, with the outcome of the rounds so far."""
    return replace(
        derived,
        recipe=written.recipe,
        method=written.method,
        seed=written.seed,
        rounds=written.rounds,
        peak_memory_bytes=written.peak_memory_bytes,
        git=written.git,
        versions=written.versions,
        target=written.target,
    )


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
    undefined: list[str] = []
    try:
        recipe = _bytes(folder / "recipe.toml").decode()
        task = tomllib.loads(recipe).get("task", "classification")
    except ValueError as error:
        if isinstance(error, FedcoreError):
            raise
        raise FedcoreError(f"{folder / 'recipe.toml'} is not TOML: {error}") from None

    def fields(name: str) -> Fields:
        path = folder / name
        return Fields(_parse(_bytes(path), str(path), undefined), str(path))

    measure = measure_of(str(task))
    environment = fields("environment.json").values
    partition = _partition(fields("partition.json"))
    path = folder / "metrics.jsonl"
    rounds, interrupted = _rounds(_bytes(path), path, undefined, measure)
    summary = _derived_summary(rounds, recipe, folder, measure)
    if (folder / "summary.json").exists():
        written = _summary(fields("summary.json"), measure)
        summary = written if written.finished else _with_names(summary, written)
    if interrupted and summary.finished:
        raise FedcoreError(f"{path}: the last line is cut off, yet summary.json says finished")
    return RunRecord(
        folder=folder,
        recipe=recipe,
        environment=environment,
        partition=partition,
        rounds=rounds,
        summary=summary,
        interrupted_line=interrupted,
        not_finite=len(undefined),
        measure=measure,
        sample=_sample(fields("sample.json")) if (folder / "sample.json").exists() else None,
    )
