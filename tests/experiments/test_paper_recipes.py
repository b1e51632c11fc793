"""The papers' recipes on tiny random models of their families, and without any model at all."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcore.data.peft_files import read_adapter
from fedcore.experiments.run import start
from fedcore.recipes import load_recipe
from tests.experiments.jobs import TOPICS, write_language_model
from tests.processes import ONE_THREAD
from tests.training.gguf_files import write_gguf

PAIRS = {
    "roberta-large-qnli": ("question", "sentence"),
    "roberta-large-mnli": ("premise", "hypothesis"),
    "llama2-7b-commonsense": ("instruction", "output"),
    "llama2-7b-gsm8k": ("question", "answer"),
}
WORDS = " ".join(TOPICS.values()).split()


def write_rows(path: Path, columns: tuple[str, str], words: list[str]) -> Path:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(40):
        picks = torch.randint(len(words), (8,), generator=generator).tolist()
        said = [words[pick] for pick in picks]
        texts = dict(zip(columns, (" ".join(said[:4]), " ".join(said[4:])), strict=True))
        rows.append({**texts, "label": ("no", "yes")[i % 2]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_roberta(folder: Path) -> Path:
    """A random RoBERTa as deep as the large one; ``</s>`` stands between the texts of a pair."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=24,
        num_attention_heads=2,
        max_position_embeddings=140,
        num_labels=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        RobertaForSequenceClassification(config).save_pretrained(folder)
    return folder


def small(name: str, folder: Path, model: Path, words: list[str] = WORDS) -> Any:
    """The recipe as it is, but for what its run needs: sources, and how much of everything."""
    settings: dict[str, Any] = {
        "model.source": str(model),
        "data.source": str(write_rows(folder / "rows.jsonl", PAIRS[name], words)),
        "data.test_fraction": 0.2,
        "rounds": 2,
        "clients": 2,
        "partition.min_examples": 4,
        "training.batch_size": 4,
        "evaluation.every": 1,
        # What lm-eval asks comes from the hub.
        **({"evaluation.tasks": []} if name.startswith("llama") else {}),
    }
    if load_recipe(name).training.epochs is None:
        settings["training.steps"] = 1
    return load_recipe(name, settings)


def run(name: str, folder: Path, model: Path, **options: Any) -> dict[str, Any]:
    recipe = small(name, folder, model, **options)
    summary = start(recipe, folder / "run")
    paper = load_recipe(name)
    assert (recipe.adapter, recipe.optimiser) == (paper.adapter, paper.optimiser)
    adapter = read_adapter(folder / "run" / "adapter")
    assert {adapter.rank(module) for module in adapter.factors} == {paper.adapter.rank}
    if paper.adapter.layers is not None:
        layers = {int(m.split("layer")[1].split(".")[1]) for m in map(layered, adapter.factors)}
        assert layers == set(paper.adapter.layers)
    return summary


def layered(module: str) -> str:
    return module.replace("layers", "layer")


@pytest.mark.parametrize(
    "name",
    ["roberta-large-qnli", pytest.param("roberta-large-mnli", marks=pytest.mark.exhaustive)],
)
def test_the_classification_recipes_run_on_a_roberta(name: str, tmp_path: Path) -> None:
    summary = run(name, tmp_path, write_roberta(tmp_path / "model"))
    assert 0 <= summary["accuracy"] <= 1
    assert summary["bytes_up"]["head"] > 0


@pytest.mark.parametrize(
    "name",
    [pytest.param("llama2-7b-commonsense", marks=pytest.mark.exhaustive), "llama2-7b-gsm8k"],
)
def test_the_recipes_of_language_models_run_on_a_llama(name: str, tmp_path: Path) -> None:
    deep = load_recipe(name).adapter.layers is not None
    model = write_language_model(tmp_path / "model", layers=32 if deep else 2)
    summary = run(name, tmp_path, model)
    assert summary["perplexity"] == pytest.approx(math.exp(summary["loss"]))
    assert summary["bytes_up"]["head"] == 0


def test_a_causal_recipe_runs_on_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_gguf(tmp_path / "model" / "tiny.gguf")
    summary = run("llama2-7b-gsm8k", tmp_path, tmp_path / "model", words=["a", "b", "ab"])
    assert summary["perplexity"] == pytest.approx(math.exp(summary["loss"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name if n == 0 else pytest.param(name, marks=pytest.mark.exhaustive)
        for n, name in enumerate(PAIRS)
    ],
)
def test_without_hub_or_files_a_run_ends_at_once_in_one_line(name: str, tmp_path: Path) -> None:
    """In offline mode, which asks no network: the same on any machine without the model."""
    done = subprocess.run(
        [sys.executable, "-c", "from fedcore.cli import main; main()", "run", name, "--out", "run"],
        env={
            "PYTHONPATH": ":".join(map(str, map(Path.resolve, map(Path, sys.path)))),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "cache"),
            **ONE_THREAD,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    model = load_recipe(name).model.source
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fedcore: model '{model}' is not in this machine's cache and ")
    assert line.endswith("; pass a local folder with --set model.source=PATH")
    assert (done.returncode, done.stdout) == (2, "")
    assert list(tmp_path.iterdir()) == []
