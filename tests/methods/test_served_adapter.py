"""From uploaded folders to a served model: nothing is lost or scaled twice on the way."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fedcore.data import Cohort, adapter_from_row, read_adapter, write_adapter
from fedcore.methods import Broadcast, create_method


def base():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential()
    model.add_module("q", nn.Linear(6, 5))
    model.add_module("head", nn.Linear(5, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def upload(folder, seed, alpha):
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q"])
    model = get_peft_model(base(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def test_an_aggregated_folder_serves_the_aggregate(tmp_path):
    folders = {"a": upload(tmp_path / "a", 1, 16), "b": upload(tmp_path / "b", 2, 3)}
    cohort = Cohort.from_folders(folders, {"a": 1.0, "b": 3.0})
    previous = Broadcast(cohort.layout, torch.zeros(cohort.layout.size))
    result = create_method("fedit").aggregate(cohort, previous)
    merged = adapter_from_row(result.row, cohort.layout, like=read_adapter(folders["a"]))
    served = PeftModel.from_pretrained(base(), write_adapter(merged, tmp_path / "merged"))

    a, b = (read_adapter(folders[c]).factors["q"] for c in "ab")
    mean_a = 0.25 * a["A"] + 0.75 * b["A"]
    mean_b = 0.25 * 8.0 * a["B"] + 0.75 * 1.5 * b["B"]
    plain = base()
    with torch.no_grad():
        plain.q.weight += mean_b @ mean_a
    x = torch.randn(4, 6)
    torch.testing.assert_close(served(x), plain(x), rtol=1e-5, atol=1e-5)
