"""On a quantised base, updates of base weights stay beside it and its bits stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from fedcore.data.exchange import read_broadcast
from fedcore.training.live_adapter import live_adapter
from fedcore.training.trainer_client import FederatedClient
from fedcore.transports.folders import FileServer
from tests.training.trainer_rounds import EXAMPLES, trainer
from tests.tuners.tiny import bert, logits

METHODS = ("flora", "fedex", "florist")
SCALING = 2.0


class Int8Linear(nn.Linear):
    """A linear layer with a byte for a weight and a scale for a row of them."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, device="meta")
        weight = plain.weight.detach()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(plain.bias.detach().clone(), requires_grad=False)

    def dense(self) -> Tensor:
        return self.weight.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense(), self.bias)


def quantised() -> nn.Module:
    """A tiny BERT whose encoder holds int8 weights."""
    model = bert()
    layers = [(n, m) for n, m in model.bert.encoder.named_modules() if isinstance(m, nn.Linear)]
    for name, layer in layers:
        parent, _, child = name.rpartition(".")
        setattr(model.bert.encoder.get_submodule(parent), child, Int8Linear(layer))
    return model


def client_model() -> PeftModel:
    torch.manual_seed(3)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS")
    return get_peft_model(quantised(), config)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the base."""
    return {
        key: tensor.clone()
        for key, tensor in model.state_dict().items()
        if "lora_" not in key and "modules_to_save" not in key
    }


def products(adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): SCALING
        * adapter[key.replace("lora_A", "lora_B")].double()
        @ tensor.double()
        for key, tensor in adapter.items()
        if "lora_A" in key
    }


@pytest.mark.parametrize("method", METHODS)
def test_no_bit_of_the_base_changes_and_the_model_is_the_base_plus_the_mean_of_products(
    tmp_path: Path, method: str
) -> None:
    options = {"tau": 1.0} if method == "florist" else {}
    server = FileServer.create(
        tmp_path / "federation", live_adapter(client_model()), method, **options
    )
    before = bits(client_model())
    assert {tensor.dtype for tensor in before.values()} >= {torch.int8, torch.float32}
    moved: dict[str, Tensor] = {}
    count = sum(EXAMPLES.values())
    for t in range(2):
        served = products(load_file(server.broadcast / "adapter_model.safetensors"))
        # What the residual holds already, and what the adapters of this round add to it.
        base = {module: moved.get(module, 0.0) - update for module, update in served.items()}
        mean = {module: torch.zeros_like(update) for module, update in served.items()}
        for site, examples in EXAMPLES.items():
            model = client_model()
            with FederatedClient(model) as client:
                client.receive(server.broadcast)
                trainer(model, tmp_path, client, site).train()
                upload = client.upload(tmp_path / f"uploads-{t}" / site)
            held = bits(model)
            assert held.keys() == before.keys()
            assert all(torch.equal(before[key], tensor) for key, tensor in held.items())
            sent = products(load_file(upload / "adapter_model.safetensors"))
            for module, update in sent.items():
                mean[module] += examples / count * update
        moved = {module: base[module] + update for module, update in mean.items()}
        server = server.round(tmp_path / f"uploads-{t}")
    assert all(float(update.abs().max()) > 1e-2 for update in moved.values())

    model = client_model()
    client = FederatedClient(model)
    client.receive(server.broadcast)
    assert read_broadcast(server.broadcast).residual
    found = logits(model.eval())
    plain = client_model()
    with torch.no_grad():
        for name, layer in plain.get_base_model().named_modules():
            if name in moved:
                dense = nn.Linear(layer.in_features, layer.out_features)
                dense.weight.copy_(layer.base_layer.dense() + moved[name].float())
                dense.bias.copy_(layer.base_layer.bias)
                parent, _, child = name.rpartition(".")
                setattr(plain.get_base_model().get_submodule(parent), child, dense)
        head = {k: v for k, v in model.state_dict().items() if "modules_to_save" in k}
        plain.load_state_dict(head, strict=False)
    torch.testing.assert_close(found, logits(plain.eval()), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[key], tensor) for key, tensor in bits(model).items())
