"""A Trainer client on another base is refused before it trains, and by the server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fedcore.data.base_identity import BaseIdentity
from fedcore.data.exchange import read_broadcast
from fedcore.data.peft_files import write_adapter
from fedcore.errors import FedcoreError
from fedcore.training.base_identity import identity_of
from fedcore.training.trainer_client import FederatedClient
from fedcore.transports.folders import FileServer
from tests.training.test_base_identity import other_base, tokenizer
from tests.training.test_quantised_base import quantised
from tests.training.trainer_rounds import EXAMPLES, lora_bert, start_of, trainer
from tests.tuners.tiny import bert


def on(base: nn.Module) -> PeftModel:
    torch.manual_seed(3)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["query", "value"], task_type="SEQ_CLS")
    return get_peft_model(base, config)


def federation(folder: Path, **options: Any) -> FileServer:
    return FileServer.create(folder / "federation", start_of(lora_bert()), "fedit", **options)


def take_part(
    server: FileServer, model: PeftModel, folder: Path, site: str = "site-1", **options: Any
) -> Path:
    client = FederatedClient(model, **options)
    client.receive(server.broadcast)
    trainer(model, folder, client, site).train()
    return client.upload(folder / f"uploads-{client.round}" / site)


CASES: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "seed 99": (
        lambda: other_base(bert),
        tokenizer,
        r"in its weights, first bert\.embeddings\.word_embeddings\.weight; load",
    ),
    "int8": (
        quantised,
        tokenizer,
        r"in its quantisation, first bert\.encoder\.layer\.0\.attention\.self\.query\.weight: int8",
    ),
    "template": (bert, lambda: tokenizer(template="x"), "in its template, first chat_template"),
    "tokenizer": (bert, lambda: tokenizer("a b d"), "in its tokenizer, first model"),
    "no tokenizer": (bert, lambda: None, "it does not say the tokenizer of its base"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_another_base_is_refused_before_training(case: str, tmp_path: Path) -> None:
    build, words, message = CASES[case]
    server = federation(tmp_path, base=identity_of(bert(), tokenizer()))
    model = on(build())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(FedcoreError, match=f"this client does not fit round 0: .*{message}"):
        FederatedClient(model, tokenizer=words()).receive(server.broadcast)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_the_same_base_takes_part_whatever_its_head_was(tmp_path: Path) -> None:
    """A head is drawn at every site; the broadcast's takes its place."""
    server = federation(tmp_path, base=identity_of(bert(), tokenizer()))
    base = bert()
    with torch.no_grad():
        base.classifier.weight.add_(1)  # type: ignore[union-attr, operator]
    take_part(server, on(base), tmp_path, tokenizer=tokenizer())
    after = server.round(tmp_path / "uploads-0")
    assert after.state.record["flags"] == []
    # The broadcast says it in short, and the tensors beside it.
    about = json.loads((after.broadcast / "broadcast.json").read_text())
    assert set(about["base"]) == {"mode", "parts"}
    assert BaseIdentity.read(after.broadcast) == server.served.base
    sent = json.loads((tmp_path / "uploads-0" / "site-1" / "upload.json").read_text())
    assert sent["base"] == about["base"]
    assert not (tmp_path / "uploads-0" / "site-1" / "base.json").exists()


def test_a_difference_that_is_allowed_is_flagged_in_every_round(tmp_path: Path) -> None:
    base = identity_of(bert(), tokenizer())
    server = federation(tmp_path, base=base, allow=["template"])
    for _ in range(2):
        words = tokenizer(template="x")
        take_part(server, lora_bert(), tmp_path, tokenizer=words)
        server = FileServer.open(tmp_path / "federation").round(
            tmp_path / f"uploads-{server.state.round}"
        )
        assert (
            "site-1: its base differs from the server's in its template, first chat_template, as "
            "allowed"
        ) in server.state.record["flags"]
    with pytest.raises(FedcoreError, match="did you mean template"):
        federation(tmp_path / "other", allow=["templates"])


def test_a_server_without_a_model_reads_the_base_beside_the_adapter(tmp_path: Path) -> None:
    write_adapter(start_of(lora_bert()), tmp_path / "start")
    identity_of(bert()).save(tmp_path / "start")
    server = FileServer.create(tmp_path / "federation", tmp_path / "start", "fedit")
    with pytest.raises(FedcoreError, match="in its weights, first"):
        FederatedClient(on(other_base(bert))).receive(server.broadcast)


def test_the_first_rounds_base_holds_where_the_server_names_none(tmp_path: Path) -> None:
    server = federation(tmp_path)
    for site in EXAMPLES:
        take_part(server, lora_bert(), tmp_path, site)
    # Nobody knew it, so the tensors come along.
    assert BaseIdentity.read(tmp_path / "uploads-0" / "site-1") is not None
    take_part(server, on(other_base(bert)), tmp_path / "foreign")
    folders = {f.name: f for f in (tmp_path / "uploads-0").iterdir()}
    folders["a-site"] = tmp_path / "foreign" / "uploads-0" / "site-1"
    after = server.round(folders, on_invalid="drop")
    (dropped,) = after.state.record["dropped"]
    assert dropped["client"] == "a-site"
    assert "differs from site-1's in its weights, first bert.embeddings" in dropped["reason"]
    opened = FileServer.open(tmp_path / "federation")
    assert read_broadcast(opened.broadcast).base == after.served.base
    with pytest.raises(FedcoreError, match=r"differs from the server's in its weights, first bert"):
        FederatedClient(on(other_base(bert))).receive(opened.broadcast)


def test_a_broadcast_whose_base_file_is_anothers_is_refused(tmp_path: Path) -> None:
    server = federation(tmp_path, base=identity_of(bert()))
    identity_of(quantised()).save(server.broadcast)
    with pytest.raises(
        FedcoreError, match=r"base\.json is not of the base that is named beside it"
    ):
        FederatedClient(lora_bert()).receive(server.broadcast)


def test_an_upload_and_a_broadcast_of_version_0_1_are_read(tmp_path: Path) -> None:
    server = federation(tmp_path)
    about = json.loads((server.broadcast / "broadcast.json").read_text())
    assert set(about) == {"round", "method", "options", "identity"}
    upload = take_part(server, lora_bert(), tmp_path)
    said = json.loads((upload / "upload.json").read_text())
    old = ("round", "examples", "frozen", "started_from", "flags")
    (upload / "upload.json").write_text(json.dumps({name: said[name] for name in old}))
    (upload / "base.json").unlink()
    after = server.round(tmp_path / "uploads-0")
    assert after.state.record["clients"] == {"site-1": 6.0}
    assert after.served.base is None


def test_the_servers_mode_is_the_clients(tmp_path: Path) -> None:
    server = federation(tmp_path, base=identity_of(bert(), mode="full"))
    upload = take_part(server, lora_bert(), tmp_path)
    assert json.loads((upload / "upload.json").read_text())["base"]["mode"] == "full"
