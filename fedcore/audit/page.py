"""The gradient-matching audit as rows, a table and one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedcore.audit.attack import CONTROLS, PIXELS, Attempt, Audit
from fedcore.audit.image_quality import PSNR_CEILING
from fedcore.audit.network import UPLOADS
from fedcore.audit.plots import nearness, picture_rows
from fedcore.reports.document import Page, PageSection, Picture, write_page
from fedcore.reports.formatting import DASH, plural, scientific
from fedcore.reports.grid import Column, Grid
from fedcore.reports.intervals import estimate

_MEASURED: dict[str, Callable[[Attempt], float | None]] = {
    "psnr": lambda attempt: attempt.quality.psnr,
    "mse": lambda attempt: attempt.quality.mse,
    "ssim": lambda attempt: attempt.quality.ssim,
    "exact": lambda attempt: attempt.quality.exact,
    "loss": lambda attempt: attempt.loss,
    "directions": lambda attempt: float(attempt.directions),
}
_COLUMNS = 8

CAVEATS = (
    "The attack is a lower bound of what an upload shows. That it fails is no guarantee: a better "
    "one, a prior of what pictures look like, or several uploads may succeed.",
    "Only the worst case for the client was played: a small fp64 network, one step of plain "
    "gradient descent, a few pictures, labels and step size known, no noise, no mean over clients. "
    "Many local steps, large batches and secure sums make it harder; none of them was measured.",
    "Directions count, at the truth and to first order, in how many of the unknowns' directions "
    "the upload changes at all. Fewer than the unknowns: pictures that differ from the true ones "
    "have the same upload, and no attack can choose between them without a prior. As many: the "
    "pictures are determined nearby, if the gradient is known precisely enough.",
    "A gradient of a batch of b has rank b, so a core of r x r shows at most b (2r - b) numbers "
    "per layer (b up to r), not r^2. What protects is that this is less than the unknowns, summed "
    "over layers; it is not a property of the core as such, and more layers or a higher rank "
    "undo it.",
    "While B is zero, as in a first round, the gradients of LoRA's A and of CE-LoRA's core are "
    "exactly zero: they show nothing, and neither do they train.",
    "CE-LoRA's clients keep A and B to themselves; this attacker was given them, which can only "
    "help it. Its head is not sent; here no upload but full fine-tuning holds a dense head or "
    "biases. Where a dense head is sent, it shows more.",
)


def audit_rows(audit: Audit) -> list[dict[str, Any]]:
    """One flat row, ready for JSON, for each upload and then each control.

    Means are over seeds; ``*_half_width`` is that of the 95% Student-t interval and ``None`` for
    one seed. ``unknowns`` are the pixels of a batch.
    """
    settings = audit.settings
    rows = []
    for name in (*settings.uploads, *CONTROLS):
        attempts = audit.of(name)
        row: dict[str, Any] = {"name": name, "title": _title(name), "control": name in CONTROLS}
        row |= {"seeds": len(attempts), "batch": settings.batch, "rank": settings.rank}
        row |= {"layers": settings.layers, "warm_up": settings.warm_up}
        row |= {"numbers": attempts[0].numbers, "unknowns": PIXELS * settings.batch}
        row["silent"] = sum(attempt.silent for attempt in attempts)
        for measure, value in _MEASURED.items():
            interval = estimate([value(attempt) for attempt in attempts])
            row[f"{measure}_mean"] = interval.mean
            row[f"{measure}_half_width"] = interval.half_width
        rows.append(row)
    return rows


def audit_grid(audit: Audit) -> Grid:
    """The table for terminal, Markdown and page."""
    rows = []
    for row in audit_rows(audit):
        control = row["control"]
        loss = row["loss_mean"]
        rows.append(
            (
                row["title"],
                DASH if control else f"{row['numbers']:,}",
                DASH if control else f"{row['directions_mean']:.0f} of {row['unknowns']}",
                DASH if loss is None else "silent" if row["silent"] else scientific(loss),
                _interval(row, "psnr", 1),
                _interval(row, "ssim", 2),
                f"{row['exact_mean']:.0%}",
            )
        )
    columns = (
        Column("upload", number=False),
        Column("numbers sent"),
        Column("directions seen"),
        Column("matching loss"),
        Column("PSNR dB"),
        Column("SSIM"),
        Column("exact"),
    )
    settings = audit.settings
    note = (
        f"Mean ± half the 95% interval over {plural(settings.seeds, 'seed')}; PSNR of a picture "
        f"counts up to {PSNR_CEILING:.0f} dB. exact: pictures with every pixel at its true grey "
        "level. silent: the uploaded gradient was zero."
    )
    title = f"Gradient matching, {plural(settings.batch, 'picture')} a batch, rank {settings.rank}"
    return Grid(title, columns, tuple(rows), note)


def findings(audit: Audit) -> list[str]:
    """What the numbers say, one sentence for each upload."""
    rows = {row["name"]: row for row in audit_rows(audit)}
    guess = rows["label mean"]
    sentences = []
    for name in audit.settings.uploads:
        row = rows[name]
        gain = estimate(
            [
                attempt.quality.psnr - other.quality.psnr
                for attempt, other in zip(audit.of(name), audit.of("label mean"), strict=True)
            ]
        )
        assert gain.mean is not None
        unsure = gain.half_width is None or abs(gain.mean) <= gain.half_width
        what = f"{_title(name)}: {row['psnr_mean']:.1f} dB"
        if row["silent"] == row["seeds"]:
            sentences.append(f"{what}; the gradient was zero and showed nothing.")
            continue
        beside = f"{abs(gain.mean):.1f} dB {'above' if gain.mean > 0 else 'below'} the guess"
        doubt = ", within the interval" if unsure else ""
        known = f"{row['directions_mean']:.0f} of {row['unknowns']} directions seen"
        sentences.append(f"{what}, {beside}{doubt}; {known}, {row['exact_mean']:.0%} exact.")
    label = "The guess, without any upload: the mean of the public pictures of the label"
    return [*sentences, f"{label}, {guess['psnr_mean']:.1f} dB."]


def write_audit(audit: Audit, folder: str | Path) -> Path:
    """Write ``audit.html``, ``audit.json`` and ``plots/*.png`` into a folder.

    Returns:
        The page's path. The page needs no other file and no network.
    """
    folder = Path(folder)
    settings = audit.settings
    sentence = (
        f"A server that knows everything but the pictures tries to draw them from one upload: "
        f"{plural(settings.batch, 'picture')} of 8 x 8 through {settings.layers} adapted linear "
        f"layers, {plural(settings.seeds, 'seed')}."
    )
    page = Page(
        kind="Privacy audit",
        title="What one upload shows",
        outcome=sentence,
        notes=findings(audit),
        sections=(
            PageSection(tables=[audit_grid(audit)]),
            PageSection("Figures", pictures=_pictures(audit)),
            PageSection(
                "What this shows and what not",
                notes=CAVEATS,
                folded=[("Settings", json.dumps(vars(settings), indent=2))],
            ),
        ),
    )
    facts = {"settings": vars(settings), "rows": audit_rows(audit), "caveats": CAVEATS}
    text = json.dumps(facts, indent=2) + "\n"
    return write_page(page, folder / "audit.html", {"audit.json": text.encode()})


def _pictures(audit: Audit) -> list[Picture]:
    names = (*audit.settings.uploads, *CONTROLS)
    shown: dict[str, np.ndarray] = {}
    truth = [attempt.truth.numpy() for attempt in audit.of(names[0])]
    shown["original"] = np.concatenate(truth)[:_COLUMNS]
    for name in (*audit.settings.uploads, "label mean"):
        reconstructions = [attempt.quality.pictures.numpy() for attempt in audit.of(name)]
        shown[_title(name)] = np.concatenate(reconstructions)[:_COLUMNS]
    psnr = {_title(name): [a.quality.psnr for a in audit.of(name)] for name in names}
    return [
        Picture(
            "reconstructions",
            "Above: the client's pictures. Below: what the attack made of each upload, the start "
            "with the least matching loss, in the order that fits best; last, a guess without any "
            f"upload. The first {len(shown['original'])} pictures, batch after batch, not chosen.",
            picture_rows(shown),
        ),
        Picture(
            "nearness",
            "PSNR of the reconstructions, higher is nearer: one dot per seed, the mean and its 95% "
            "interval. Controls, which see no upload, in the second colour.",
            nearness(psnr, [*CONTROLS.values()], "PSNR, dB"),
        ),
    ]


def _title(name: str) -> str:
    return CONTROLS[name] if name in CONTROLS else UPLOADS[name].title


def _interval(row: dict[str, Any], measure: str, decimals: int) -> str:
    half = row[f"{measure}_half_width"]
    width = DASH if half is None else f"{half:.{decimals}f}"
    return f"{row[f'{measure}_mean']:.{decimals}f} ± {width}"
