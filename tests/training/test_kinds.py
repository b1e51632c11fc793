"""One client of a federation by folders trains an adapter of any kind: the next round has it."""

import warnings

import pytest
import torch
from peft import get_peft_model

from fedcore import FedcoreError
from fedcore.training.trainer_client import FederatedClient
from fedcore.transports.folders import FileServer
from tests.property.kinds import CASES, adalora, base_model, lora, save_adapter

METHODS = ("fedit", "product_svd", "flora", "fedex")
IN_ROUNDS = [
    (field, model, config, METHODS[n % len(METHODS)])
    for n, (field, model, config) in enumerate(CASES)
    if field not in ("target_parameters", "layer_replication") and model != "conv"
]


def wrapped(model, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        return get_peft_model(base_model(model), config)


@torch.no_grad()
def logits(model):
    tokens = torch.randint(0, 23, (2, 6), generator=torch.Generator().manual_seed(5))
    return model.eval()(tokens).logits.double()


@torch.no_grad()
def train(model):
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    ("field", "model", "config", "method"), IN_ROUNDS, ids=lambda value: str(value)[:24]
)
def test_what_one_client_trains_is_what_the_next_round_has(tmp_path, field, model, config, method):
    start = save_adapter(tmp_path / "start", model, config, 1)
    embedding = "embed_tokens" in config.target_modules
    if method in ("flora", "fedex") and (field == "use_dora" or embedding):
        with pytest.raises(FedcoreError, match=r"DoRA normalises|an embedding takes no update"):
            FileServer.create(tmp_path / "run", start, method)
        return
    server = FileServer.create(tmp_path / "run", start, method)
    client_model = wrapped(model, config)
    with FederatedClient(client_model, examples=8) as client:
        client.receive(server.broadcast)
        received = logits(client_model)
        train(client_model)
        client.upload(tmp_path / "uploads/site")
        trained = logits(client_model)
    server = server.round(tmp_path / "uploads")
    again = wrapped(model, config)
    with FederatedClient(again, examples=8) as client:
        client.receive(server.broadcast)
        got = logits(again)
    assert float((trained - received).norm()) > 1e-2
    assert float((got - trained).norm()) < 1e-5 * float((trained - received).norm())


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("llama", adalora(), "AdaLoRA keeps singular values"),
        ("mixtral", lora(target_parameters=["mlp.experts.down_proj"]), "of experts"),
        ("conv", lora(target_modules=["first"]), "of a convolution"),
        ("llama", lora(init_lora_weights="pissa"), "change the base weights"),
    ],
    ids=["adalora", "experts", "convolution", "pissa"],
)
def test_a_client_whose_adapter_rounds_cannot_train_is_refused_by_name(model, config, message):
    with pytest.raises(FedcoreError, match=message):
        FederatedClient(wrapped(model, config), examples=8)
