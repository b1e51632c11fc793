"""Evaluation with a few tokens' logits at a time equals that with all, in less memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fedcore.training.encoding import IGNORED
from fedcore.training.evaluation import Evaluation, evaluate
from fedcore.training.forward import Forward
from fedcore.training.next_tokens import NextTokens
from fedcore.training.prefix import FrozenPrefix
from fedcore.training.token_head import TokenHead
from tests.experiments.jobs import tiny_causal_recipe
from tests.tuners.tiny import gpt2, llama

ROOT = Path(__file__).parents[2]
VOCABULARY, TOKENS = 61, 7


def built(name: str, text: str = "", **more: Any) -> nn.Module:
    """A tiny causal model of a family, with logits far from zero."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "initializer_range": 0.5,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}{text}Config")(**{**sizes, **more})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "qwen2": lambda: built("Qwen2", num_key_value_heads=2),
    "qwen3": lambda: built("Qwen3", num_key_value_heads=2, head_dim=6),
    "mistral": lambda: built("Mistral", num_key_value_heads=2),
    "mixtral": lambda: built("Mixtral", num_key_value_heads=2, num_local_experts=3),
    "phi": lambda: built("Phi", hidden_size=32),
    "opt": lambda: built("OPT", ffn_dim=28, max_position_embeddings=32, word_embed_proj_dim=24),
    "falcon": lambda: built("Falcon", alibi=False),
    "gpt-neox": lambda: built("GPTNeoX"),
    "bloom": lambda: built("Bloom", n_head=4, n_layer=2),
    "gemma": lambda: built("Gemma", num_key_value_heads=2, head_dim=6),
    "gemma2, soft cap": lambda: built("Gemma2", num_key_value_heads=2, head_dim=6),
    "gemma3": lambda: built("Gemma3", "Text", num_key_value_heads=2, head_dim=6),
    "cohere, scale": lambda: built("Cohere", num_key_value_heads=2),
    "cohere2, scale": lambda: built("Cohere2", num_key_value_heads=2),
    "granite, divisor": lambda: built("Granite", num_key_value_heads=2, logits_scaling=4.0),
    "olmo2": lambda: built("Olmo2", num_key_value_heads=2),
}


def examples(count: int = 5, length: int = TOKENS, vocabulary: int = VOCABULARY) -> NextTokens:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, vocabulary, (count, length), generator=generator)
    lengths = torch.randint(2, length + 1, (count, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return NextTokens(ids * mask, mask, torch.zeros(count, dtype=torch.int64))


def by_whole_logits(model: nn.Module, data: NextTokens, indices: Tensor) -> Evaluation:
    """The definition: all logits of all texts at once."""
    with torch.no_grad():
        ids, mask = data.input_ids[indices], data.attention_mask[indices]
        logits = model(input_ids=ids, attention_mask=mask).logits.double()
    targets = data.targets(indices)
    losses = nn.functional.cross_entropy(logits.mT, targets, ignore_index=IGNORED, reduction="none")
    wanted = targets != IGNORED
    right = (logits.argmax(-1) == targets) & wanted
    return Evaluation(indices, wanted.sum(1), right.sum(1), losses.sum(1))


def same(found: Evaluation, expected: Evaluation) -> None:
    assert torch.equal(found.predictions, expected.predictions)
    assert torch.equal(found.correct, expected.correct)
    assert found.losses.dtype == torch.float32
    torch.testing.assert_close(found.losses.double(), expected.losses, rtol=1e-6, atol=1e-6)


ONE_TOKEN = 1


@pytest.mark.parametrize("name", FAMILIES)
def test_outcomes_are_those_of_the_whole_logits(name: str) -> None:
    model, data = FAMILIES[name](), examples()
    indices = torch.tensor([3, 0, 4, 1])
    expected = by_whole_logits(model, data, indices)
    forward = Forward(model, data)
    assert isinstance(forward.head, TokenHead), forward.head
    for budget in (ONE_TOKEN, 3 * 4 * VOCABULARY * 5, 256 << 20):
        same(evaluate(forward, data, indices, 3, budget), expected)


@pytest.mark.parametrize("target", [["q_proj"], ["q_proj", "lm_head"]])
def test_an_adapter_and_a_reused_prefix_change_nothing(target: list[str]) -> None:
    torch.manual_seed(1)
    config = LoraConfig(
        r=3,
        target_modules=r".*layers\.1\..*q_proj|lm_head" if len(target) > 1 else r".*\.1\..*q_proj",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model, data = get_peft_model(llama(), config).eval(), examples()
    prefix = FrozenPrefix.find(model)
    assert prefix is not None
    indices = torch.arange(5)
    expected = by_whole_logits(model, data, indices)
    states = prefix.compute(data, 2)
    for forward in (Forward(model, data), Forward(model, data, prefix, states)):
        assert isinstance(forward.head, TokenHead)
        same(evaluate(forward, data, indices, 2, 4096), expected)


def test_no_pass_makes_more_logits_than_the_budget_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = llama(), examples()
    forward = Forward(model, data)
    assert isinstance(forward.head, TokenHead)
    seen: list[int] = []
    head = model.lm_head
    assert isinstance(head, nn.Module)
    head.register_forward_hook(lambda _, __, output: seen.append(output.numel() // VOCABULARY))
    evaluate(forward, data, torch.arange(5), 5, logits_budget=3 * 4 * VOCABULARY * 4)
    wanted = int((data.targets(torch.arange(5)) != IGNORED).sum())
    assert sum(seen) == wanted
    assert max(seen) == 4


class Odd(nn.Module):
    """A model that does to its logits what no field of its configuration says."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()
        self.config = self.inner.config
        self.calls: list[int] = []

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.lm_head  # type: ignore[return-value]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        self.calls.append(input_ids.numel())
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        output.logits = output.logits - 0.1 * output.logits**2
        return output


def test_a_model_of_logits_of_its_own_keeps_them_in_smaller_batches() -> None:
    model, data = Odd(), examples()
    forward = Forward(model, data)
    assert forward.head == "it does something to its logits that is not known"
    model.calls.clear()
    indices = torch.arange(5)
    budget = 2 * 3 * 4 * VOCABULARY * TOKENS
    same(evaluate(forward, data, indices, 4, budget), by_whole_logits(model, data, indices))
    assert max(model.calls[:-1]) == 2 * TOKENS


def test_a_run_flags_it_in_every_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedcore.experiments.observer import Observer
    from fedcore.experiments.setup import build_experiment

    recipe = tiny_causal_recipe(tmp_path)
    assert build_experiment(recipe, Observer()).flags == ()
    monkeypatch.setattr(TokenHead, "find", classmethod(lambda *_: "it is odd"))
    flags = build_experiment(recipe, Observer()).flags
    assert flags == ("evaluation makes whole logits, in smaller batches: it is odd",)


SCRIPT = """
import sys
import torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from fedcore.training.evaluation import evaluate
from fedcore.training.forward import Forward
from tests.training.test_token_head import examples

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=128256, **sizes)).eval()
data = examples(2, 512, 128256)
forward = Forward(model, data)
forward.head
with torch.no_grad():
    model.base_model(input_ids=data.input_ids, attention_mask=data.attention_mask)
before = peak()
evaluate(forward, data, torch.arange(2), 2, logits_budget=int(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_peak_memory_is_within_the_budget() -> None:
    budget = 32 << 20
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(budget)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": paths, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    # The logits of the two texts are 525 MB, and as much again for an fp32 copy.
    assert int(done.stdout) < budget + (64 << 20)
