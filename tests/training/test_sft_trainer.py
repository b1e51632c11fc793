"""trl's SFTTrainer, as it is installed, with the client among its callbacks."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from fedcore.training.trainer_client import FederatedClient
from fedcore.transports.folders import FileServer
from tests.experiments.jobs import write_language_model

TEXTS = {
    "site-1": ["match goal team win league", "bank market share profit"] * 4,
    "site-2": ["actor movie star award scene", "price trade stock fund"] * 2,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_language_model(tmp_path_factory.mktemp("home") / "model", layers=1)


def build(home):
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(AutoModelForCausalLM.from_pretrained(home), config)


def take_part(home, broadcast, folder, site):
    model = build(home)
    tokenizer = AutoTokenizer.from_pretrained(home)
    tokenizer.pad_token = tokenizer.eos_token
    client = FederatedClient(model)
    client.receive(broadcast)
    arguments = SFTConfig(
        str(folder.parent / "trainer"),
        max_steps=2,
        max_length=8,
        per_device_train_batch_size=2,
        learning_rate=5e-2,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": TEXTS[site]}),
        processing_class=tokenizer,
        callbacks=[client],
    )
    trainer.train()
    client.upload(folder)


def test_two_rounds_of_rolora_are_the_means_of_what_was_trained(home, tmp_path):
    build(home).save_pretrained(tmp_path / "start")
    server = FileServer.create(tmp_path / "federation", tmp_path / "start", "rolora")
    for t, factor in enumerate("BA"):
        before = load_file(server.broadcast / "adapter_model.safetensors")
        for site in TEXTS:
            take_part(home, server.broadcast, tmp_path / f"uploads-{t}" / site, site)
        server = server.round(tmp_path / f"uploads-{t}")
        assert server.state.record["clients"] == {"site-1": 8.0, "site-2": 4.0}
        sent = [
            load_file(tmp_path / f"uploads-{t}" / site / "adapter_model.safetensors")
            for site in TEXTS
        ]
        after = load_file(server.broadcast / "adapter_model.safetensors")
        for key, tensor in after.items():
            if f"lora_{factor}" in key:
                assert not torch.equal(sent[0][key], before[key])
                expected = (2 * sent[0][key].double() + sent[1][key].double()) / 3
                torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
            else:
                assert all(key not in tensors for tensors in sent)
                assert torch.equal(tensor, before[key])
