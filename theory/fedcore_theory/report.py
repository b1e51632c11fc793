"""The page of all checks: what is claimed, what was measured, and a picture of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedcore.data.folders import write_text
from fedcore.reports.document import Page, PageSection, Picture, render
from fedcore_theory.running import Result
from fedcore_theory.tables import failures, measured_grid, results_grid

PARTS: Mapping[str, str] = {
    "R": "RoLoRA: one factor at a time",
    "A": "FFA-LoRA: A frozen",
    "V": "FedAvg of the factors",
    "G": "FLoRG: Gram adapters",
    "FR": "FedRot-LoRA: rotations before the mean",
    "N": "FLoRA-NA: nearest combinations",
    "I": "Inexact aggregation",
    "C": "CE-LoRA and tri-factor adapters",
    "D": "Noise for privacy",
    "S": "Systems",
    "X": "Small networks",
}
"""The letters of the ids, and what the checks of each are about."""


def write_report(results: Sequence[Result], path: str | Path) -> Path:
    """Write one HTML file that needs no other and no network; returns its path."""
    verdicts = Counter(result.check.verdict for result in results)
    odd = failures(results)
    sentence = (
        f"{len(results)} checks, every one came out as its verdict says."
        if not odd
        else f"{len({line.split(':')[0] for line in odd})} of {len(results)} checks did not come "
        "out as their verdicts say."
    )
    parts = {
        title: [_part(result) for result in results if _letters(result.check.id) == letters]
        for letters, title in PARTS.items()
    }
    page = Page(
        kind="Numeric checks",
        title="Claims on federated low-rank adaptation",
        outcome=sentence,
        facts={
            "claims that hold": (str(verdicts["holds"]), "with the stated constants"),
            "errata": (str(verdicts["erratum"]), "printed claims that fail"),
            "artefacts": (str(verdicts["artefact"]), "of how something is measured"),
            "time": (f"{sum(result.seconds for result in results):.0f} s", "of one core"),
        },
        notes=odd,
        sections=[
            PageSection(tables=[results_grid(results)]),
            *(PageSection(title, parts=checks) for title, checks in parts.items() if checks),
        ],
        tab="Numeric checks of fedcore",
    )
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(render(page), out)
    return out


def _letters(name: str) -> str:
    return "".join(letter for letter in name if letter.isupper())


def _part(result: Result) -> PageSection:
    check, outcome = result.check, result.outcome
    words = {
        "Claim": check.claim,
        "Source": check.source,
        "Our part": check.derivation,
        "Assumptions": check.assumptions,
        "Data": check.data,
        "Sample": outcome.samples,
        "Excludes": outcome.excludes,
        "Finding": check.finding,
    }
    return PageSection(
        f"{check.id}: {check.title} ({check.verdict})",
        terms={name: text for name, text in words.items() if text},
        tables=[measured_grid(outcome)],
        pictures=[Picture(f"check-{check.id}", _caption(result), check.picture(outcome))],
        anchor=check.id,
    )


def _caption(result: Result) -> str:
    return (
        f"{result.check.id}, {result.check.title}: in colour what the check is about, black and "
        "dashed what it stands against."
    )
