"""The estimate of a step's memory: beside real steps, and of a model too large for here."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
)

from fedcore.errors import FedcoreError
from fedcore.training.optimisers import OptimiserSettings
from fedcore.training.step_memory import step_memory
from tests.processes import ONE_THREAD

ADAM = OptimiserSettings(rate=1e-4)

REAL_STEP = """
import gc, sys, torch
from pathlib import Path
from tests.training.test_step_memory import ADAM, small, names
from fedcore.training.evaluation import prediction_loss
from fedcore.training.optimisers import build_optimiser

checkpointing = sys.argv[1] == "True"
model = small()
trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
ids = torch.randint(0, 16000, (4, 512))
model(input_ids=ids[:, :4])
if checkpointing:
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
model.train()

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
optimiser = build_optimiser(trained, frozenset(), ADAM)
logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
loss = prediction_loss(logits, ids)
loss.backward()
optimiser.step()
print(status("VmHWM") - before)
"""


def small():
    config = LlamaConfig(
        vocab_size=16000,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return adapted(AutoModelForCausalLM.from_config(config))


def adapted(model):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))


def names(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_what_a_real_step_takes(checkpointing):
    """Resident memory of a step in a process of its own; attention here copies a little more."""
    model = small()
    found = step_memory(model, names(model), ADAM, batch=4, length=512, checkpointing=checkpointing)
    assert found.weights == sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
    # Freed blocks are returned at once, or the peak is that of the allocator.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", REAL_STEP, str(checkpointing)],
        env={**os.environ, **ONE_THREAD, **allocator, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    real = int(done.stdout)
    assert 0.95 * real < found.step < 1.15 * real


def test_llama_3_8b_trains_at_2048_tokens_within_24_gb():
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = adapted(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    found = step_memory(model, names(model), ADAM, batch=1, length=2048, checkpointing=True)
    # 8.03 billion numbers of two bytes, and the adapter's of four.
    assert 16.0e9 < found.weights < 16.2e9
    assert found.total < 24e9
    # Whole logits alone: bf16 ones, fp32 ones, their exponentials.
    assert found.step > 2048 * 128256 * (2 + 4 + 4)


def test_nothing_of_the_model_changes_and_nothing_is_computed():
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    model = BertForSequenceClassification(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    sizes = [
        step_memory(model, ["classifier.weight"], ADAM, batch=b, length=8).step for b in (1, 2, 4)
    ]
    assert sizes == sorted(sizes)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_not_known_is_said():
    model = small()
    with pytest.raises(FedcoreError, match="no parameter 'none'"):
        step_memory(model, ["none"], ADAM, batch=1, length=8)
    for wrong in ({"batch": 0}, {"length": 1}):
        with pytest.raises(FedcoreError, match="pass an integer of"):
            step_memory(model, names(model), ADAM, **{"batch": 1, "length": 8, **wrong})


def test_a_model_that_reads_numbers_is_refused():
    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, input_ids, attention_mask):
            return self.weight * float(input_ids.sum())

    with pytest.raises(FedcoreError, match="Reads cannot run without numbers"):
        step_memory(Reads(), ["weight"], ADAM, batch=1, length=8)
