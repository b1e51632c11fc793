"""A checkpoint of another round does not take the broadcast's place; one of this round does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import set_peft_model_state_dict
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from fedcore.data.folders import read_object
from fedcore.errors import FedcoreError
from fedcore.training.live_adapter import live_adapter
from fedcore.training.trainer_client import FederatedClient
from fedcore.transports.folders import FileServer
from tests.training.trainer_rounds import Texts, lora_bert, start_of

OTHER_VALUES = r"round \d: training would not start from the broadcast: .* holds other values"
OTHER_ROUND = r"round 1: training would not start from the broadcast: the Trainer continues at step"


def saving(model: nn.Module, client: FederatedClient, folder: Path, *more: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=5e-2,
        seed=7,
        report_to=[],
        save_strategy="steps",
        save_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    texts = Texts(10, seed=1, causal=False)
    return Trainer(model, arguments, train_dataset=texts, callbacks=[client, *more])


class Killed(TrainerCallback):  # type: ignore[misc]
    """Ends the process's training after the second step."""

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def received(server: FileServer) -> tuple[nn.Module, FederatedClient]:
    model = lora_bert()
    client = FederatedClient(model)
    client.receive(server.broadcast)
    return model, client


def round_of(server: FileServer, folder: Path, output: Path, resume: Any = None) -> FileServer:
    model, client = received(server)
    saving(model, client, output).train(resume_from_checkpoint=resume)
    client.upload(folder / f"uploads-{client.round}" / "site-1")
    return server.round(folder / f"uploads-{client.round}")


@pytest.fixture
def server(tmp_path: Path) -> FileServer:
    return FileServer.create(tmp_path / "federation", start_of(lora_bert()), "fedit")


@pytest.mark.parametrize("how", ["the newest", "by its path"])
def test_a_checkpoint_of_the_round_before_is_refused(
    server: FileServer, tmp_path: Path, how: str
) -> None:
    output = tmp_path / "trainer"
    after = round_of(server, tmp_path, output)
    checkpoint: Any = True if how == "the newest" else str(output / "checkpoint-2")
    model, client = received(after)
    with pytest.raises(FedcoreError, match=OTHER_ROUND):
        saving(model, client, output).train(resume_from_checkpoint=checkpoint)
    # Nor is what it holds sent.
    with pytest.raises(FedcoreError, match=OTHER_ROUND):
        client.upload(tmp_path / "up")
    assert not (tmp_path / "up").exists()
    client.receive(after.broadcast)
    saving(model, client, tmp_path / "another").train()
    client.upload(tmp_path / "up")


def test_a_round_that_was_interrupted_resumes_from_its_own_checkpoint(
    server: FileServer, tmp_path: Path
) -> None:
    straight = round_of(server, tmp_path / "straight", tmp_path / "one")
    output = tmp_path / "two"
    model, client = received(server)
    with pytest.raises(KeyboardInterrupt):
        saving(model, client, output, Killed()).train()
    # In a new process: another model, another client.
    model, client = received(server)
    saving(model, client, output).train(resume_from_checkpoint=str(output / "checkpoint-2"))
    upload = client.upload(tmp_path / "resumed" / "site-1")
    about = read_object(upload / "upload.json", "upload")
    assert about["flags"] == ["training resumed from a checkpoint of this round"]
    again = FileServer.create(tmp_path / "other", start_of(lora_bert()), "fedit")
    assert torch.equal(again.round(tmp_path / "resumed").state.row, straight.state.row)


def test_a_checkpoint_says_to_which_broadcast_it_belongs(
    server: FileServer, tmp_path: Path
) -> None:
    output = tmp_path / "trainer"
    round_of(server, tmp_path, output)
    about = json.loads((output / "checkpoint-2" / "fedcore.json").read_text())
    assert about["round"] == 0
    assert about["broadcast"] == server.served.identity
    # One that was written into an other's name is not believed: its values are compared.
    model, client = received(server)
    for step in (1, 2, 3):
        file = output / f"checkpoint-{step}" / "fedcore.json"
        file.write_text(json.dumps({**about, "values": "0" * 64}))
    with pytest.raises(FedcoreError, match="continues at step 2"):
        saving(model, client, output).train(resume_from_checkpoint=str(output / "checkpoint-2"))


def test_values_that_a_script_loads_itself_are_refused(server: FileServer, tmp_path: Path) -> None:
    model, client = received(server)
    moved = {key: tensor + 1 for key, tensor in live_adapter(model).to_peft().items()}
    set_peft_model_state_dict(model, moved)
    with pytest.raises(FedcoreError, match=OTHER_VALUES):
        saving(model, client, tmp_path / "trainer").train()


def test_a_head_alone_that_moved_is_refused(server: FileServer, tmp_path: Path) -> None:
    model, client = received(server)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].bias.add_(1)  # type: ignore[union-attr, operator, index]
    with pytest.raises(FedcoreError, match=r"classifier\.bias holds other values"):
        saving(model, client, tmp_path / "trainer").train()


def test_values_that_a_trainer_rounds_are_flagged(server: FileServer, tmp_path: Path) -> None:
    """trl does so on 4- and 8-bit bases."""
    model, client = received(server)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    model.to(torch.bfloat16)
    saving(model, client, tmp_path / "trainer").train()
    upload = client.upload(tmp_path / "up")
    flags = read_object(upload / "upload.json", "upload")["flags"]
    assert flags == ["training started from values rounded to bfloat16"]
