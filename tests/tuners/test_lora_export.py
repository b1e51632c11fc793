"""LoRA whose scales or ranks a plain reader would miss, exported as plain LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fedcore.errors import FedcoreError
from fedcore.tuners import export_lora
from tests.reference.served import problems
from tests.tuners.tiny import bert, llama, tokens

TARGETS = ["q_proj", "v_proj", "down_proj"]
ODD = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 5}},
    "alphas": {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"v_proj": 1}},
    "all": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 7}},
}


def trained(config: LoraConfig) -> PeftModel:
    torch.manual_seed(3)
    model = get_peft_model(bert() if config.task_type == "SEQ_CLS" else llama(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


@pytest.mark.parametrize("odd", ODD)
def test_a_plain_reader_gets_the_same_model(odd: str, tmp_path: Path) -> None:
    model = trained(LoraConfig(r=3, lora_alpha=8, target_modules=TARGETS, **ODD[odd]))
    model.save_pretrained(tmp_path / "adapter")
    # Ranks of a pattern with one alpha are what llama.cpp computes by itself.
    wrong = any("scaled by" in problem for problem in problems(tmp_path / "adapter"))
    assert wrong == (odd != "patterns")
    folder = export_lora(tmp_path / "adapter", tmp_path / "plain")
    assert problems(folder) == []
    again = PeftModel.from_pretrained(llama(), folder).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(again) - logits(llama())).abs().max() > 0.1


def test_a_head_is_carried_along(tmp_path: Path) -> None:
    options = {"target_modules": ["query"], "task_type": "SEQ_CLS", "use_rslora": True}
    model = trained(LoraConfig(r=3, lora_alpha=8, **options))
    folder = export_lora(model, tmp_path / "plain")
    again = PeftModel.from_pretrained(bert(), folder).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "DoRA normalises"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is set"),
        ({"target_modules": ["embed_tokens"]}, "it adapts an embedding"),
    ],
)
def test_what_plain_lora_does_not_have_is_refused(
    config: dict[str, object], message: str, tmp_path: Path
) -> None:
    model = get_peft_model(llama(), LoraConfig(**{"target_modules": ["q_proj"], **config}))
    with pytest.raises(FedcoreError, match=rf"adapter: .*{message}.*; merge it into the model"):
        export_lora(model, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
