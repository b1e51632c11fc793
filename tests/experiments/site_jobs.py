"""Small federations whose sites have files of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fedcore.recipes import Recipe, load_recipe
from tests.experiments.jobs import TOPICS, write_language_model, write_model

SITES = {"hospital-a": 100, "hospital-b": 40}
"""Site to the rows of its file."""


def write_site(file: Path, rows: int, seed: int, text: str = "text", label: str = "label") -> Path:
    """A JSONL file of short texts, no two alike, with their topics."""
    generator = torch.Generator().manual_seed(seed)
    topics = sorted(TOPICS)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(rows):
        words = TOPICS[topics[i % 3]].split()
        picks = torch.randint(len(words), (6,), generator=generator).tolist()
        # A number in words of the vocabulary keeps texts apart.
        mark = " ".join(words[int(digit)] for digit in f"{i:03o}")
        content = " ".join(words[p] for p in picks)
        lines.append(json.dumps({text: f"{content} {mark}", label: topics[i % 3]}))
    file.write_text("\n".join(lines) + "\n")
    return file


def write_sites(folder: Path, sites: dict[str, int] | None = None) -> Path:
    """One file per site below ``folder``."""
    for seed, (name, rows) in enumerate((sites or SITES).items()):
        write_site(folder / f"{name}.jsonl", rows, seed)
    return folder


def site_recipe(home: Path, task: str = "classification", **settings: Any) -> Recipe:
    """Two rounds, a few steps; pass ``data.sites`` or ``data.source``."""
    generates = task != "classification"
    model = home / ("site-language-model" if generates else "site-model")
    if not model.exists():
        (write_language_model if generates else write_model)(model)
    file = home / "sites.toml"
    file.write_text("")
    common: dict[str, Any] = {
        "name": "sites",
        "task": task,
        "rounds": 2,
        "model.source": str(model),
        "model.max_length": 12,
        "adapter.rank": 2,
        "method.name": "fedit",
        "training.steps": 2,
        "training.batch_size": 8,
    }
    if generates:
        common |= {"data.label_column": "", "adapter.target_modules": ["q_proj", "v_proj"]}
    if task == "sft":
        common |= {"data.format": "columns"}
        common |= {"data.columns": {"prompt": "{label}", "completion": " {text}"}}
    return load_recipe(file, {**common, **settings})
