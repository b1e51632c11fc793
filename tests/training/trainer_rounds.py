"""Real Trainer rounds of a tiny model, by files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from fedcore.data.adapter_state import AdapterState
from fedcore.training.live_adapter import live_adapter
from fedcore.training.trainer_client import FederatedClient
from fedcore.tuners import GramConfig
from tests.tuners.tiny import VOCABULARY, bert, llama

EXAMPLES: Mapping[str, int] = {"site-1": 6, "site-2": 10}


class Texts(Dataset[dict[str, Any]]):
    """Random tokens; labels are classes for a classifier, the tokens for a language model."""

    def __init__(self, count: int, seed: int, causal: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, VOCABULARY, (count, 5), generator=generator)
        self.causal = causal

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = self.tokens[index]
        return {"input_ids": tokens, "labels": tokens if self.causal else tokens[0] % 3}


def lora_bert() -> PeftModel:
    torch.manual_seed(3)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS")
    return get_peft_model(bert(), config)


def gram_llama() -> PeftModel:
    config = GramConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(llama(), config)


def start_of(model: nn.Module) -> AdapterState:
    return live_adapter(model)


def trainer(model: nn.Module, folder: Path, client: FederatedClient, site: str) -> Trainer:
    causal = "Llama" in type(model.get_base_model()).__name__  # type: ignore[operator]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=5e-2,
        seed=7,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    texts = Texts(EXAMPLES[site], seed=len(site) + int(site[-1]), causal=causal)
    return Trainer(model, arguments, train_dataset=texts, callbacks=[client])


def train_and_upload(
    build: Any, broadcast: Path, folder: Path, site: str, **options: Any
) -> FederatedClient:
    """One client's round in a process of its own, as far as its model goes."""
    client = FederatedClient(model := build(), **options)
    client.receive(broadcast)
    trainer(model, folder, client, site).train()
    client.upload(folder / f"uploads-{client.round}" / site)
    return client
