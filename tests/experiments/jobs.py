"""Small jobs for tests: a tiny model on disk and a few texts, no package data needed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

from fedcore.recipes import Recipe, load_recipe

TOPICS = {
    "sport": "match goal team win league player coach season",
    "money": "bank market share profit price trade stock fund",
    "film": "actor movie star award scene director oscar studio",
}


def write_texts(path: Path, each: int = 30) -> Path:
    """A CSV of short texts whose topic shows in their words."""
    generator = torch.Generator().manual_seed(0)
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["text", "label"])
        for topic, words in TOPICS.items():
            vocabulary = words.split()
            for i in range(each):
                picks = torch.randint(len(vocabulary), (6,), generator=generator).tolist()
                writer.writerow([" ".join(vocabulary[p] for p in picks) + f" {i}", topic])
    return path


def write_model(folder: Path, layers: int = 3) -> Path:
    """A random BERT with a word-level vocabulary that covers the texts."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for text in TOPICS.values() for word in text.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_labels=3,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def write_language_model(folder: Path, layers: int = 3) -> Path:
    """A random Llama with grouped heads and a word-level vocabulary that covers the texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = sorted({word for text in TOPICS.values() for word in text.split()})
    numbers = [str(i) for i in range(30)]
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unk>", *words, *numbers])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_causal_recipe(folder: Path, **settings: Any) -> Recipe:
    """Three clients, two rounds, a few steps of next-token prediction on the tiny texts."""
    model, texts = folder / "language-model", folder / "stories.csv"
    if not model.exists():
        write_language_model(model)
        write_texts(texts)
    common = {
        "name": "tiny-causal",
        "task": "causal",
        "rounds": 2,
        "clients": 3,
        "model.source": str(model),
        "model.max_length": 8,
        "data.source": str(texts),
        "partition.alpha": 1.0,
        "partition.min_examples": 4,
        "adapter.rank": 4,
        "adapter.target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
        "adapter.layers": [-2, -1],
        "training.steps": 4,
        "training.batch_size": 8,
        "evaluation.every": 1,
    }
    return load_recipe("bbc-news", {**common, **settings})


def tiny_recipe(folder: Path, **settings: Any) -> Recipe:
    """Four clients, two rounds, a few steps, on the tiny model and texts below ``folder``."""
    model, texts = folder / "model", folder / "texts.csv"
    if not model.exists():
        write_model(model)
        write_texts(texts)
    common = {
        "name": "tiny",
        "rounds": 2,
        "clients": 4,
        "model.source": str(model),
        "model.max_length": 12,
        "data.source": str(texts),
        "partition.alpha": 1.0,
        "partition.min_examples": 4,
        "adapter.rank": 2,
        "training.steps": 2,
        "training.batch_size": 8,
        "evaluation.every": 1,
    }
    return load_recipe("bbc-news", {**common, **settings})
