"""A client's round through trl beside our own loop, a bare trl script and a bare PyTorch loop.

    python -m bench.sft_turn --model smollm2 --rows 8 --steps 2

All train the same LoRA factors on the same rows, batch by batch of the same size, padded to the
longest row of the batch. A round is timed whole: what the trainer costs to build is part of it.
Contestants alternate, and the fastest of each is compared. Memory is that of one round each, in a
process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from bench.machine import describe_machine
from fedcore.training.answer_tokens import AnswerTokens
from fedcore.training.binding import ModelBinding
from fedcore.training.encoding import IGNORED
from fedcore.training.forward import Forward
from fedcore.training.language_models import load_language_model
from fedcore.training.local_training import LocalSettings, train_client
from fedcore.training.optimisers import OptimiserSettings
from fedcore.training.sft_options import SftSettings
from fedcore.training.sft_turn import take_sft_turn
from fedcore.training.trainer_traces import model_as_before
from fedcore.tuners.attach import attach_adapter

RATE = 1e-4


def random_rows(count: int, vocabulary: int, longest: int, pad: int) -> AnswerTokens:
    """Rows of random tokens, a quarter to all of ``longest``; half of each is a prompt."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 4, longest + 1, (count,), generator=generator).tolist()
    ids = [
        torch.randint(3, vocabulary, (n,), generator=generator).to(torch.int32).numpy()
        for n in lengths
    ]
    answers = [np.where(np.arange(len(row)) < len(row) // 2, IGNORED, row) for row in ids]
    labels = torch.zeros(count, dtype=torch.int64)
    return AnswerTokens(tuple(ids), tuple(a.astype(np.int32) for a in answers), labels, pad)


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
    examples = random_rows(count, base.config.vocab_size, longest, tokenizer.pad_token_id)
    rows = examples.dataset()
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

    def plain() -> None:
        """The fewest lines of PyTorch that train the same factors on batches padded alike."""
        optimiser = torch.optim.AdamW(parameters.values(), lr=RATE, weight_decay=0.0)
        model.train()
        for step in range(steps):
            chosen = torch.arange(step * batch, (step + 1) * batch) % count
            inputs = examples.inputs(chosen)
            logits = model(**inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), examples.targets(chosen).flatten(), ignore_index=IGNORED
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    return {
        "own loop": own,
        "fedcore through trl": turn,
        "bare trl script": script,
        "bare PyTorch loop": plain,
    }


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


def peak_of(name: str, chosen: argparse.Namespace) -> int:
    """Bytes by which one round of ``name`` lets a process of its own grow, at its peak."""
    options = [f"--{key}={value}" for key, value in vars(chosen).items() if key != "alone"]
    # Freed blocks go back at once, or the peak is that of the allocator.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "bench.sft_turn", *options, f"--alone={name}"]
    done = subprocess.run(
        command, env={**os.environ, **allocator}, capture_output=True, text=True, check=True
    )
    return int(done.stdout.splitlines()[-1])


def grown(take: Callable[[], object]) -> int:
    """Bytes by which this process grows at its peak while ``take`` runs."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    take()
    return status("VmHWM") - before


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
    parser.add_argument("--alone", help="Print the memory of one contestant, and nothing else.")
    chosen = parser.parse_args()
    turns = contestants(chosen.model, chosen.rows, chosen.steps, chosen.batch, chosen.longest)
    if chosen.alone:
        print(grown(turns[chosen.alone]))
        return
    best = measure(turns, chosen.repeats)
    print(describe_machine(torch.device("cpu")))
    print(
        f"{chosen.model}, LoRA of rank 8 on q_proj and v_proj, {chosen.steps} steps of "
        f"{chosen.batch} rows, {chosen.longest // 4} to {chosen.longest} tokens; fastest of "
        f"{chosen.repeats} rounds, contestants in turn; memory of a round in a process of its own\n"
    )
    del turns
    peaks = {name: peak_of(name, chosen) for name in best}
    others = ("bare PyTorch loop", "bare trl script")
    print("| round | s | " + " | ".join(f"over the {name}" for name in others) + " | MB | over |")
    print("|---|---|---|---|---|---|")
    for name, seconds in best.items():
        ratios = [f"{seconds / best[other]:.2f}" for other in others]
        memory = [f"{peaks[name] / 1e6:.0f}", f"{peaks[name] / peaks[others[0]]:.2f}"]
        print(f"| {name} | {seconds:.2f} | " + " | ".join([*ratios, *memory]) + " |")


if __name__ == "__main__":
    main()
