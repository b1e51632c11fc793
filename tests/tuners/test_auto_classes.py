"""PEFT's automatic classes know our adapter types once ``fedcore.tuners`` is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from fedcore.tuners import GramConfig, TriConfig
from tests.tuners.tiny import VOCABULARY, bert, logits

SCRIPT = """
import sys, torch
import fedcore.tuners
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import save_file
model = AutoPeftModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=3).eval()
tokens = torch.randint(0, int(sys.argv[2]), (3, 7), generator=torch.Generator().manual_seed(5))
with torch.no_grad():
    save_file({"logits": model(tokens).logits}, sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gram", "tri"])
def test_a_saved_adapter_loads_by_its_folder_in_another_process(tmp_path: Path, kind: str) -> None:
    base = bert()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    config = {"gram": GramConfig, "tri": TriConfig}[kind]
    model = get_peft_model(
        base, config(r=3, lora_alpha=6, target_modules=["query"], task_type="SEQ_CLS")
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.eval().save_pretrained(tmp_path / "adapter")
    found = tmp_path / "logits.safetensors"
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "adapter"), str(VOCABULARY), str(found)],
        check=True,
        timeout=120,
    )
    expected = logits(model)
    torch.testing.assert_close(load_file(found)["logits"], expected)
    with model.disable_adapter():
        assert not torch.allclose(expected, logits(model))
