"""A user's Trainer script, as it is and with the client's lines, in processes of their own."""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fedcore
import fedcore_kernels
from fedcore.transports.folders import FileServer
from tests.experiments.jobs import TOPICS, write_model

SCRIPTS = Path(__file__).with_name("scripts")
STOCK, FEDERATED = SCRIPTS / "finetune.py", SCRIPTS / "finetune_federated.py"
EXAMPLES = {"site-1": 8, "site-2": 24}
SCALING = 3.0


def test_the_federated_script_is_the_stock_one_with_a_few_lines_added() -> None:
    stock, federated = (script.read_text().splitlines() for script in (STOCK, FEDERATED))
    changes = [line for line in difflib.ndiff(stock, federated) if line[0] in "+-?"]
    assert all(line.startswith("+ ") for line in changes), changes
    added = [line[2:].strip() for line in changes if line[2:].strip()]
    assert added == [
        "from fedcore.training.trainer_client import FederatedClient",
        'parser.add_argument("--upload", required=True)',
        "client = FederatedClient(model)",
        "client.receive(args.adapter)",
        "callbacks=[client],",
        "client.upload(args.upload)",
    ]


def write_job(folder: Path) -> None:
    """A base model, a first adapter of it, and each client's texts."""
    model = write_model(folder / "base")
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
    with torch.no_grad():
        # Wide weights, so that attention learns in a few steps, not the head alone.
        for parameter in base.bert.encoder.parameters():
            parameter *= 8 if parameter.dim() > 1 else 1
    base.save_pretrained(model)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS")
    get_peft_model(base, config).save_pretrained(folder / "start")
    topics = [words.split() for words in TOPICS.values()]
    generator = torch.Generator().manual_seed(2)
    for site, count in EXAMPLES.items():
        labels = torch.randint(3, (count,), generator=generator).tolist()
        picks = torch.randint(8, (count, 5), generator=generator).tolist()
        rows = [
            {"text": " ".join(topics[label][word] for word in words), "label": label}
            for label, words in zip(labels, picks, strict=True)
        ]
        lines = (json.dumps(row) + "\n" for row in rows)
        (folder / f"{site}.jsonl").write_text("".join(lines))


def run_all(jobs: list[list[str]]) -> None:
    """Run the commands at the same time."""
    homes = {str(Path(package.__path__[0]).parent) for package in (fedcore, fedcore_kernels)}
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(homes),
        "HF_HUB_OFFLINE": "1",
    }
    running = [
        subprocess.Popen(
            [sys.executable, *job], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for job in jobs
    ]
    try:
        ended = [(process.communicate(timeout=300)[1], process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()
    for job, (said, code) in zip(jobs, ended, strict=True):
        assert code == 0, f"{job}:\n{said.decode()}"


def command(
    script: Path, folder: Path, base: str, adapter: Path, site: str, out: Path
) -> list[str]:
    data = str(folder / f"{site}.jsonl")
    places = ["--model", str(folder / base), "--adapter", str(adapter), "--data", data]
    return [str(script), *places, "--out", str(out / site)]


def pairs(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Module to ``s B A``, in fp64."""
    return {
        key.removesuffix(".lora_A.weight").removeprefix("base_model.model."): SCALING
        * adapter[key.replace("lora_A", "lora_B")].double()
        @ tensor.double()
        for key, tensor in adapter.items()
        if "lora_A" in key
    }


def mean(values: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Weighted by examples, key by key, in fp64."""
    count = sum(EXAMPLES.values())
    names = next(iter(values.values()))
    return {
        name: sum(EXAMPLES[site] / count * held[name].double() for site, held in values.items())
        for name in names
    }


def add_to_base(folder: Path, base: str, update: Mapping[str, Tensor], out: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder / base, num_labels=3)
    layers = dict(model.named_modules())
    with torch.no_grad():
        for module, change in update.items():
            layers[module].weight += change.float()
    model.save_pretrained(folder / out)
    AutoTokenizer.from_pretrained(folder / base).save_pretrained(folder / out)


@pytest.mark.slow
def test_two_rounds_are_what_dense_means_by_hand_give_of_the_stock_script(tmp_path: Path) -> None:
    """By hand: train by the stock script, average the products, add them to the base weights."""
    write_job(tmp_path)
    server = FileServer.create(tmp_path / "federation", tmp_path / "start", "flora")
    total: dict[str, Tensor] = {}
    for t in range(2):
        by_hand, ours = tmp_path / f"by-hand-{t}", tmp_path / f"ours-{t}"
        uploads = tmp_path / f"uploads-{t}"
        bases = {STOCK: "base" if t == 0 else "merged", FEDERATED: "base"}
        jobs = []
        for site in EXAMPLES:
            for script, out in ((STOCK, by_hand), (FEDERATED, ours)):
                jobs.append(command(script, tmp_path, bases[script], server.broadcast, site, out))
            jobs[-1] += ["--upload", str(uploads / site)]
        run_all(jobs)
        weights = "adapter_model.safetensors"
        found = {site: load_file(by_hand / site / weights) for site in EXAMPLES}
        sent = {site: load_file(uploads / site / weights) for site in EXAMPLES}
        for site, expected in found.items():
            assert expected.keys() == sent[site].keys()
            for key, tensor in expected.items():
                # The client's lines change no bit of a training; a base that was merged rounds.
                tolerance = 0.0 if t == 0 else 1e-5
                torch.testing.assert_close(sent[site][key], tensor, rtol=0, atol=tolerance)
        update = mean({site: pairs(adapter) for site, adapter in found.items()})
        assert all(float(change.abs().max()) > 1e-3 for change in update.values()), {
            m: float(c.abs().max()) for m, c in update.items()
        }
        total = {m: total[m] + change if total else change for m, change in update.items()}
        add_to_base(tmp_path, bases[STOCK], update, "merged")
        server = server.round(uploads)
        assert server.state.record["clients"] == {s: float(n) for s, n in EXAMPLES.items()}
        for module, change in total.items():
            residual = server.served.residual[module]
            dense = SCALING * residual.outer.double().T @ residual.inner.double()
            torch.testing.assert_close(dense, change, rtol=0, atol=1e-5)
        served = load_file(server.broadcast / weights)
        assert all(not tensor.any() for key, tensor in served.items() if "lora_B" in key)
        heads = mean({s: {k: v for k, v in a.items() if "lora" not in k} for s, a in found.items()})
        for key, tensor in heads.items():
            torch.testing.assert_close(served[key].double(), tensor, rtol=0, atol=1e-5)
