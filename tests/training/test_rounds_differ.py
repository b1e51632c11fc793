"""A Trainer script's rounds draw other examples and share one schedule; broadcasts say how many."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

from fedcore.data.announcement import Announcement
from fedcore.data.exchange import BROADCAST_FILE, read_broadcast, write_broadcast
from fedcore.data.folders import read_object
from fedcore.errors import FedcoreError
from fedcore.training.round_draws import RoundDraws
from fedcore.training.trainer_client import FederatedClient
from fedcore.transports.folders import FileServer
from tests.training.trainer_rounds import Texts, lora_bert, start_of

STEPS, BATCH, EXAMPLES = 3, 4, 40


class Numbered(Texts):
    """Examples that note which of them were read."""

    def __init__(self) -> None:
        super().__init__(EXAMPLES, seed=1, causal=False)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        return super().__getitem__(index)


class Rates(TrainerCallback):  # type: ignore[misc,unused-ignore]
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **rest: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    known: dict[str, Any] = {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        **{**known, "max_steps": STEPS, **more},
    )


def optimiser_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@pytest.fixture
def server(tmp_path: Path) -> FileServer:
    return FileServer.create(tmp_path / "federation", start_of(lora_bert()), "fedit", rounds=3)


Seed = Callable[[FederatedClient], int]


def rounds(
    server: FileServer, folder: Path, *, seed: Seed, examples: bool, keep: bool = False
) -> tuple[list[list[int]], list[list[str]]]:
    """Three rounds of one client: which examples it read, and its uploads' flags."""
    read, flags = [], []
    model = lora_bert()
    client = FederatedClient(model, name="site-1")
    for t in range(3):
        if not keep:
            model = lora_bert()
            client = FederatedClient(model, name="site-1")
        client.receive(server.broadcast)
        texts = Numbered()
        data: Any = client.round_examples(texts, STEPS * BATCH) if examples else texts
        made = arguments(folder, seed=seed(client))
        Trainer(model, made, train_dataset=data, callbacks=[client]).train()
        upload = client.upload(folder / f"uploads-{t}" / "site-1")
        about = read_object(upload / "upload.json", "upload")
        assert about["examples"] == EXAMPLES
        read.append(texts.read)
        flags.append(about["flags"])
        server = server.round(folder / f"uploads-{t}")
    return read, flags


def test_three_rounds_see_new_examples_each(server: FileServer, tmp_path: Path) -> None:
    read, flags = rounds(server, tmp_path, seed=FederatedClient.round_seed, examples=True)
    assert [len(indices) for indices in read] == [STEPS * BATCH] * 3
    assert len({index for indices in read for index in indices}) == 36
    assert flags == [[], [], []]


@pytest.mark.parametrize("keep", [False, True])
def test_one_seed_for_all_rounds_draws_the_same_and_is_flagged(
    server: FileServer, tmp_path: Path, keep: bool
) -> None:
    read, flags = rounds(server, tmp_path, seed=lambda _: 42, examples=False, keep=keep)
    assert read[0] == read[1] == read[2], "what a Trainer does by itself"
    assert flags[0] == []
    known = "is that of an earlier round" if keep else "may be that of every round"
    for flag in flags[1:]:
        assert len(flag) == 1
        assert f"seed 42 {known}" in flag[0]
        assert "seed=client.round_seed()" in flag[0]


def test_the_servers_record_holds_the_flag(server: FileServer, tmp_path: Path) -> None:
    for t in range(2):
        model = lora_bert()
        client = FederatedClient(model)
        client.receive(server.broadcast)
        made = arguments(tmp_path, max_steps=1)
        Trainer(model, made, train_dataset=Numbered(), callbacks=[client]).train()
        client.upload(tmp_path / f"uploads-{t}" / "site-1")
        server = server.round(tmp_path / f"uploads-{t}")
    assert "seed 42 may be that of every round" in json.dumps(server.state.record)


def test_own_seeds_that_differ_are_not_flagged(server: FileServer, tmp_path: Path) -> None:
    read, flags = rounds(
        server, tmp_path, seed=lambda client: 7 + client.round, examples=False, keep=True
    )
    assert read[0] != read[1] != read[2]
    assert flags == [[], [], []]


def test_seeds_are_of_round_and_client_and_fit_numpy() -> None:
    seeds = {
        RoundDraws(seed, client, round).trainer_seed
        for seed in range(3)
        for client in ("site-1", "site-2")
        for round in range(50)
    }
    assert len(seeds) == 300
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(("available", "wanted"), [(40, 12), (7, 3), (3, 7), (5, 5), (1, 4)])
def test_no_example_comes_again_before_all_have_come(available: int, wanted: int) -> None:
    drawn = [i for t in range(9) for i in RoundDraws(0, "a", t).examples(available, wanted)]
    assert len(drawn) == 9 * wanted
    for start in range(0, len(drawn) - available + 1, available):
        assert sorted(drawn[start : start + available]) == list(range(available))
    other = [i for t in range(9) for i in RoundDraws(0, "b", t).examples(available, wanted)]
    assert available == 1 or other != drawn


def test_examples_of_datasets_stay_a_dataset(server: FileServer) -> None:
    client = FederatedClient(lora_bert())
    client.receive(server.broadcast)
    chosen = client.round_examples(Dataset.from_list([{"a": i} for i in range(9)]), 4)
    assert isinstance(chosen, Dataset)
    assert chosen["a"] == RoundDraws(0, "", 0).examples(9, 4)
    assert client.examples == 9.0
    with pytest.raises(FedcoreError, match="available is 0; pass an integer of 1 or more"):
        client.round_examples([], 4)


@pytest.mark.parametrize(
    ("name", "warmup", "options"),
    [("cosine", 1.0, {}), ("linear", 0.0, {}), ("cosine_with_min_lr", 0.5, {"min_lr_rate": 0.1})],
)
def test_one_schedule_goes_over_all_rounds(
    server: FileServer, tmp_path: Path, name: str, warmup: float, options: dict[str, Any]
) -> None:
    seen = []
    for t in range(3):
        model = lora_bert()
        client = FederatedClient(model, name="site-1")
        client.receive(server.broadcast)
        optimiser = optimiser_of(model)
        schedule = client.scheduler(optimiser, STEPS, name, warmup_rounds=warmup, **options)
        rates = Rates()
        Trainer(
            model,
            arguments(tmp_path, seed=client.round_seed()),
            train_dataset=Numbered(),
            optimizers=(optimiser, schedule),
            callbacks=[client, rates],
        ).train()
        seen += rates.seen
        client.upload(tmp_path / f"uploads-{t}" / "site-1")
        server = server.round(tmp_path / f"uploads-{t}")
    whole = optimiser_of(lora_bert())
    schedule = get_scheduler(
        name,
        whole,
        num_warmup_steps=int(warmup * STEPS),
        num_training_steps=9,
        scheduler_specific_kwargs=options,
    )
    expected = []
    for _ in range(9):
        expected.append(whole.param_groups[0]["lr"])
        whole.step()
        schedule.step()
    assert seen == pytest.approx(expected, abs=1e-12)
    assert len(set(seen)) > 5


@pytest.mark.parametrize(
    ("round", "options", "message"),
    [
        (3, {}, "round 3 is beyond the 3 rounds of the federation"),
        (0, {"steps": 0}, "steps is 0; pass an integer of 1 or more"),
        (0, {"name": "cosine_ish"}, "unknown schedule 'cosine_ish'"),
        (0, {"name": "reduce_lr_on_plateau"}, "unknown schedule 'reduce_lr_on_plateau'"),
        (0, {"warmup_rounds": 4}, "warmup_rounds is 4 of 3 rounds"),
        (
            0,
            {"name": "cosine_with_min_lr", "minimum": 1},
            "for 'cosine_with_min_lr' 'minimum'",
        ),
    ],
)
def test_schedules_that_cannot_be_are_refused(
    server: FileServer, tmp_path: Path, round: int, options: dict[str, Any], message: str
) -> None:
    model = lora_bert()
    client = FederatedClient(model)
    folder = write_broadcast(replace(server.served, round=round), tmp_path / "later")
    client.receive(folder)
    optimiser = optimiser_of(model)
    with pytest.raises(FedcoreError, match=message):
        client.scheduler(optimiser, **{"steps": STEPS, **options})
    assert optimiser.param_groups[0]["lr"] == 1e-2


def test_a_broadcast_says_how_many_rounds_there_are(server: FileServer, tmp_path: Path) -> None:
    client = FederatedClient(lora_bert(), examples=1)
    client.receive(server.broadcast)
    assert client.total_rounds == 3
    assert "total_rounds" not in (client.upload(tmp_path / "u" / "a") / "upload.json").read_text()
    after = server.round(tmp_path / "u")
    assert read_broadcast(after.broadcast).total_rounds == 3
    assert FileServer.open(after.folder).served.total_rounds == 3


def test_one_of_an_older_server_does_not(tmp_path: Path) -> None:
    server = FileServer.create(tmp_path / "federation", start_of(lora_bert()), "fedit")
    assert "total_rounds" not in (server.broadcast / BROADCAST_FILE).read_text()
    model = lora_bert()
    client = FederatedClient(model)
    client.receive(server.broadcast)
    with pytest.raises(FedcoreError, match="does not say how many rounds there are; pass rounds"):
        client.scheduler(optimiser_of(model), STEPS)
    client.receive(server.broadcast, total_rounds=5)
    assert client.total_rounds == 5


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "3", None])
def test_a_broadcast_of_a_wrong_number_is_refused(server: FileServer, value: object) -> None:
    file = server.broadcast / BROADCAST_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "total_rounds": value}))
    with pytest.raises(FedcoreError, match=r"total_rounds is .*; it must be a positive integer"):
        FederatedClient(lora_bert()).receive(server.broadcast)


def test_numbers_of_rounds_below_one_are_refused(tmp_path: Path) -> None:
    start = start_of(lora_bert())
    with pytest.raises(FedcoreError, match="rounds is 0; pass an integer of 1 or more"):
        FileServer.create(tmp_path / "federation", start, "fedit", rounds=0)
    assert not (tmp_path / "federation").exists()
    with pytest.raises(FedcoreError, match="total_rounds is 0; pass an integer of 1 or more"):
        FederatedClient(lora_bert(), method="fedit").receive(start, round=0, total_rounds=0)


def test_an_announcement_carries_the_number_and_no_upload_repeats_it() -> None:
    announced = Announcement(1, "b", total_rounds=7)
    assert Announcement.parse(announced.text(), "it") == announced
    assert announced.answer(None, {}, {}).total_rounds is None


def test_a_stale_upload_is_refused_by_the_server(server: FileServer, tmp_path: Path) -> None:
    """A site that sends last round's values in this round's name."""
    client = FederatedClient(lora_bert(), examples=1)
    client.receive(server.broadcast)
    last = client.upload(tmp_path / "uploads-0" / "site-1")
    after = server.round(tmp_path / "uploads-0")
    with pytest.raises(FedcoreError, match=r"site-1: its upload is for round 0"):
        after.round({"site-1": last})
    about = json.loads((last / "upload.json").read_text())
    (last / "upload.json").write_text(json.dumps({**about, "round": 1}))
    # fedit of one client whose factors did not move broadcasts the same values again.
    moved = after.served.adapter
    row = moved.to_row(moved.layout()) + 1
    other = replace(
        after, served=replace(after.served, adapter=moved.with_row(row, moved.layout()))
    )
    with pytest.raises(FedcoreError, match="site-1: it started from another broadcast"):
        other.round({"site-1": last})
