"""A client's round through trl beside fedcore's own loop and beside a bare trl script.

    python -m bench.sft_turn --model smollm2 --rows 8 --steps 2

All three train the same LoRA factors on the same rows, batch by batch of the same size; the own
loop pads every row to the longest one, as it always does. A round is timed whole: what the trainer
costs to build is part of it. Contestants alternate, and the fastest of each is compared.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from bench.machine import describe_machine
from fedcore.training.binding import ModelBinding
from fedcore.training.encoding import IGNORED, EncodedDataset
from fedcore.training.forward import Forward
from fedcore.training.language_models import load_language_model
from fedcore.training.local_training import LocalSettings, train_client
from fedcore.training.optimisers import OptimiserSettings
from fedcore.training.sft_options import SftSettings
from fedcore.training.sft_turn import take_sft_turn
from fedcore.training.trainer_traces import model_as_before
from fedcore.tuners.attach import attach_adapter

RATE = 1e-4


@dataclass(frozen=True, eq=False)
class Padded(EncodedDataset):
    """Rows whose targets were chosen before, padded for fedcore's own loop.

    Attributes:
        answers: int64 ``(n, T)``, :data:`IGNORED` where nothing is to be predicted.
    """

    answers: Tensor

    def targets(self, batch: Tensor) -> Tensor:
        """The token after each token, ``(B, T)``."""
        targets = torch.full_like(self.answers[batch], IGNORED)
        targets[:, :-1] = self.answers[batch, 1:]
        return targets


def random_rows(count: int, vocabulary: int, longest: int) -> datasets.Dataset:
    """Rows of random tokens, a quarter to all of ``longest``; half of each is a prompt."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 4, longest + 1, (count,), generator=generator).tolist()
    ids = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    labels = [[IGNORED] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})


def padded(rows: datasets.Dataset, pad: int) -> Padded:
    """The same rows as tensors of one length."""
    longest = max(map(len, rows["input_ids"]))

    def filled(column: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in column])

    ids, answers = filled(rows["input_ids"], pad), filled(rows["labels"], IGNORED)
    mask = filled([[1] * len(row) for row in rows["input_ids"]], 0)
    return Padded(ids, mask, torch.zeros(len(ids), dtype=torch.int64), answers)


def contestants(
    source: str, count: int, steps: int, batch: int, longest: int
) -> dict[str, Callable[[], object]]:
    """Name to one round of ``steps`` steps, all on one model."""
    base, tokenizer = load_language_model(source)
    model: Any = attach_adapter(
        base,
        "lora",
        rank=8,
        alpha=16.0,
        target_modules=["q_proj", "v_proj"],
        layers=None,
        use_rslora=False,
        init_std=None,
        frame="structured",
        seed=0,
        task_type="CAUSAL_LM",
    )
    rows = random_rows(count, base.config.vocab_size, longest)
    examples = padded(rows, tokenizer.pad_token_id)
    forward, binding = Forward(model, examples), ModelBinding.of(model)
    parameters = binding.trained("AB")
    local, optimiser = LocalSettings(batch_size=batch, steps=steps), OptimiserSettings(rate=RATE)

    def own() -> object:
        indices = torch.arange(count)
        return train_client(
            forward, examples, indices, parameters, frozenset(), local, optimiser, seed=0
        )

    def turn() -> object:
        return take_sft_turn(
            model,
            tokenizer,
            rows,
            parameters,
            frozenset(),
            local,
            optimiser,
            SftSettings(),
            seed=0,
            client="client-00",
        )

    def script() -> None:
        with tempfile.TemporaryDirectory() as folder:
            arguments = SFTConfig(
                folder,
                max_steps=steps,
                per_device_train_batch_size=batch,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                optim="adamw_torch",
                gradient_checkpointing=False,
                use_cpu=model.device.type == "cpu",
                bf16=False,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                report_to="none",
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
            )
            # A script ends with its training; here its traces would slow what comes after it.
            with model_as_before(model):
                trainer = SFTTrainer(
                    model, arguments, train_dataset=rows, processing_class=tokenizer
                )
                trainer.remove_callback(PrinterCallback)
                trainer.train()

    return {"own loop": own, "fedcore through trl": turn, "bare trl script": script}


def measure(turns: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest of ``repeats`` rounds of each, alternating, after one of each."""
    best = dict.fromkeys(turns, float("inf"))
    for repeat in range(repeats + 1):
        for name, take in turns.items():
            start = perf_counter()
            take()
            if repeat:
                best[name] = min(best[name], perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--longest", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    chosen = parser.parse_args()
    turns = contestants(chosen.model, chosen.rows, chosen.steps, chosen.batch, chosen.longest)
    best = measure(turns, chosen.repeats)
    print(describe_machine(torch.device("cpu")))
    print(
        f"{chosen.model}, LoRA of rank 8 on q_proj and v_proj, {chosen.steps} steps of "
        f"{chosen.batch} rows, {chosen.longest // 4} to {chosen.longest} tokens\n"
    )
    print("| round | s | against the own loop | against the bare script |")
    print("|---|---|---|---|")
    for name, seconds in best.items():
        ratios = (seconds / best[other] for other in ("own loop", "bare trl script"))
        print(f"| {name} | {seconds:.2f} | " + " | ".join(f"{r:.2f}" for r in ratios) + " |")


if __name__ == "__main__":
    main()
