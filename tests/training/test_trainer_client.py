from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fedcore.data.exchange import BroadcastFolder, read_broadcast, write_broadcast
from fedcore.data.low_rank import LowRank
from fedcore.data.peft_files import write_adapter
from fedcore.errors import FedcoreError
from fedcore.methods import create_method
from fedcore.training.live_adapter import live_adapter
from fedcore.training.trainer_client import FederatedClient
from fedcore.tuners import GramConfig
from tests.training.trainer_rounds import Texts, gram_llama, lora_bert, start_of, trainer
from tests.tuners.tiny import bert, llama


def broadcast(
    folder: Path, model: nn.Module, method: str, round: int = 0, fill: float | None = None
) -> Path:
    """A server's folder; the values are the model's own, or all ``fill``."""
    adapter = start_of(model)
    if fill is not None:
        layout = adapter.layout()
        adapter = adapter.with_row(torch.full((layout.size,), fill), layout)
    name = create_method(method).name
    return write_broadcast(BroadcastFolder(adapter, round, name), folder / f"global-{round}")


def flags(model: nn.Module) -> dict[str, bool]:
    return {
        key: p.requires_grad
        for key, p in model.named_parameters()
        if "lora_" in key or "modules_to_save" in key
    }


@pytest.mark.parametrize(("round", "frozen"), [(0, "lora_A"), (1, "lora_B")])
def test_receive_loads_the_values_and_freezes_what_the_plan_does_not_train(
    tmp_path: Path, round: int, frozen: str
) -> None:
    model = lora_bert()
    client = FederatedClient(model)
    client.receive(broadcast(tmp_path, model, "rolora", round, fill=0.25))
    layout = live_adapter(model).layout()
    values = live_adapter(model).to_row(layout)
    assert all(bool((layout.view(values, slot) == 0.25).all()) for slot in layout)
    assert flags(model) == {key: frozen not in key for key in flags(model)}
    assert client.round == round


def test_training_moves_what_trains_and_sends_that_alone(tmp_path: Path) -> None:
    model = lora_bert()
    client = FederatedClient(model, method="rolora", round=1)
    folder = broadcast(tmp_path, model, "rolora", 1, fill=0.1)
    client.receive(folder)
    trainer(model, tmp_path, client, "site-2").train()
    sent = load_file(client.upload(tmp_path / "up") / "adapter_model.safetensors")
    own = live_adapter(model).to_peft()
    assert {key for key in own if "lora_B" not in key} == set(sent)
    assert all(torch.equal(sent[key], own[key]) for key in sent)
    start = read_broadcast(folder).adapter.to_peft()
    moved = {key for key in own if not torch.equal(own[key], start[key])}
    assert moved == set(sent)
    about = json.loads((tmp_path / "up" / "upload.json").read_text())
    assert (about["round"], about["examples"]) == (1, 10.0)


def test_an_upload_of_a_whole_adapter_is_one_that_peft_loads(tmp_path: Path) -> None:
    model = lora_bert()
    client = FederatedClient(model, examples=5)
    client.receive(broadcast(tmp_path, model, "fedit", fill=0.1))
    folder = client.upload(tmp_path / "up")
    loaded = PeftModel.from_pretrained(bert(), folder)
    expected, found = (live_adapter(m).to_peft() for m in (model, loaded))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_trainer_of_the_round_before_is_refused(tmp_path: Path) -> None:
    model = lora_bert()
    client = FederatedClient(model)
    client.receive(broadcast(tmp_path, model, "rolora", 0))
    used = trainer(model, tmp_path, client, "site-1")
    used.train()
    client.upload(tmp_path / "up")
    client.receive(broadcast(tmp_path, model, "rolora", 1))
    with pytest.raises(FedcoreError, match=r"the optimiser .*\.[AB]: it was built before"):
        used.train()


def test_requires_grad_is_left_as_received(tmp_path: Path) -> None:
    model = lora_bert()
    client = FederatedClient(model)
    client.receive(broadcast(tmp_path, model, "rolora", 0))
    for key, parameter in model.named_parameters():
        if "lora_A" in key:
            parameter.requires_grad_(True)
    with pytest.raises(FedcoreError, match=r"\.A requires a gradient against the round's plan"):
        trainer(model, tmp_path, client, "site-1").train()


def test_nothing_trains_before_it_was_received_or_after_it_was_sent(tmp_path: Path) -> None:
    model = lora_bert()
    client = FederatedClient(model)
    with pytest.raises(FedcoreError, match="nothing was received"):
        trainer(model, tmp_path, client, "site-1").train()
    client.receive(broadcast(tmp_path, model, "fedit"))
    trainer(model, tmp_path, client, "site-1").train()
    client.upload(tmp_path / "up")
    with pytest.raises(FedcoreError, match="round 0 was uploaded; receive the next one"):
        trainer(model, tmp_path, client, "site-1").train()


class PlainDescent(Trainer):
    """A Trainer of one's own, as trl's are: it makes its optimiser and its loss itself."""

    everything = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        chosen = [p for p in self.model.parameters() if self.everything or p.requires_grad]
        self.optimizer = torch.optim.SGD(chosen, lr=0.5)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: object
    ) -> Any:
        labels = inputs["labels"]
        output = model(input_ids=inputs["input_ids"])
        loss = 2 * torch.nn.functional.cross_entropy(output.logits, labels)
        return (loss, output) if return_outputs else loss


def own_trainer(model: nn.Module, folder: Path, client: FederatedClient) -> PlainDescent:
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=6,
        max_steps=1,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    texts = Texts(6, seed=1, causal=False)
    return PlainDescent(model, arguments, train_dataset=texts, callbacks=[client])


def test_a_class_derived_from_trainer_is_a_client_as_it_is(tmp_path: Path) -> None:
    model = lora_bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    client = FederatedClient(model)
    client.receive(broadcast(tmp_path, model, "rolora", 0))
    start = live_adapter(model).to_peft()
    texts = Texts(6, seed=1, causal=False)
    logits = model(input_ids=texts.tokens).logits
    (2 * torch.nn.functional.cross_entropy(logits, texts.tokens[:, 0] % 3)).backward()
    slopes = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    own_trainer(model, tmp_path, client).train()
    sent = load_file(client.upload(tmp_path / "up") / "adapter_model.safetensors")
    for key, slope in slopes.items():
        name = key.replace(".default", "").replace("modules_to_save.", "")
        assert slope is not None
        torch.testing.assert_close(sent[name], start[name] - 0.5 * slope, rtol=1e-5, atol=1e-6)
    assert len(slopes) == len(sent)
    assert any(bool(slope.any()) for key, slope in slopes.items() if "lora_B" in key)


def test_an_optimiser_of_ones_own_that_holds_frozen_factors_is_refused(tmp_path: Path) -> None:
    model = lora_bert()
    client = FederatedClient(model)
    client.receive(broadcast(tmp_path, model, "rolora", 0))
    own = own_trainer(model, tmp_path, client)
    own.everything = True
    with pytest.raises(FedcoreError, match=r"the optimiser steps the frozen .*\.A"):
        own.train()


def spoil(model: nn.Module, tag: str, value: float) -> None:
    with torch.no_grad():
        named = [*model.named_parameters(), *model.named_buffers()]
        next(tensor for key, tensor in named if tag in key).fill_(value)


@pytest.mark.parametrize(
    ("build", "method", "tag", "value", "message"),
    [
        (lora_bert, "rolora", "lora_A", 1.0, r"round 0: .*\.A is frozen and changed"),
        (lora_bert, "ffa", "lora_A", float("nan"), r"round 0: .*\.A is frozen and changed"),
        (lora_bert, "rolora", "lora_B", float("inf"), r"round 0: .*\.B holds .* such as inf"),
        (lora_bert, "fedit", "classifier.modules_to_save", float("nan"), r"classifier\.\w+ holds"),
        (gram_llama, "florg", "gram_A0", 1.0, r"a constant of the adapter changed"),
    ],
)
def test_what_training_broke_is_refused(
    tmp_path: Path, build: object, method: str, tag: str, value: float, message: str
) -> None:
    model = build()  # type: ignore[operator]
    client = FederatedClient(model, examples=3)
    client.receive(broadcast(tmp_path, model, method))
    spoil(model, tag, value)
    with pytest.raises(FedcoreError, match=message):
        client.on_train_end(None, None, None)
    with pytest.raises(FedcoreError, match=message):
        client.upload(tmp_path / "up")
    assert not (tmp_path / "up").exists()


def gram(**fields: object) -> nn.Module:
    known = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    return get_peft_model(llama(), GramConfig(task_type="CAUSAL_LM", **{**known, **fields}))


def lora(**fields: object) -> nn.Module:
    known = {"r": 3, "lora_alpha": 6, "target_modules": ["query", "value"]}
    return get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", **{**known, **fields}))


def half() -> nn.Module:
    model = lora_bert()
    for key, parameter in model.named_parameters():
        if "lora_A" in key:
            parameter.data = parameter.data.bfloat16()
    return model


def unfrozen() -> nn.Module:
    model = lora_bert()
    for key, parameter in model.named_parameters():
        if "LayerNorm.bias" in key:
            parameter.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("build", "method", "own", "message"),
    [
        (gram_llama, "florg", lambda: gram(frame_seed=9), "has another frame than the broadcast"),
        (gram_llama, "florg", lambda: gram(init_seed=9), "gram_A0 is not the broadcast's"),
        (gram_llama, "florg", lambda: lora_bert(), "family 'lora', the broadcast's 'gram'"),
        (lora_bert, "florg", lambda: lora_bert(), "florg.truncated needs 'gram'"),
        (lora_bert, "fedit", lambda: lora(r=2), r"is \[2, 24\] in the model and \[3, 24\]"),
        (lora_bert, "fedit", lambda: lora(lora_alpha=3), "has scaling 1 in the model and 2"),
        (lora_bert, "fedit", lambda: lora(target_modules=["query"]), "value.A, which the model"),
        (lora_bert, "fedit", unfrozen, r"trains .*LayerNorm.bias, which the broadcast lacks"),
        (lora_bert, "ffa", half, r"\.A is frozen and the model's torch.bfloat16 cannot hold"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_stays_as_it_is(
    tmp_path: Path, build: object, method: str, own: object, message: str
) -> None:
    folder = broadcast(tmp_path, build(), method)  # type: ignore[operator]
    model: nn.Module = own()  # type: ignore[operator]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    client = FederatedClient(model)
    with pytest.raises(FedcoreError, match=message):
        client.receive(folder)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    with pytest.raises(FedcoreError, match="nothing was received"):
        client.upload(tmp_path / "up")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fedit"}, r"method is FedIT\(\), the broadcast's is RoLoRA\(\)"),
        ({"round": 2}, "round is 2, the broadcast's is 1"),
        ({"method": "rolorra"}, "did you mean rolora"),
    ],
)
def test_what_the_script_expects_is_compared(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    model = lora_bert()
    folder = broadcast(tmp_path, model, "rolora", 1)
    with pytest.raises(FedcoreError, match=message):
        FederatedClient(model, **options).receive(folder)  # type: ignore[arg-type]


def test_a_changed_broadcast_is_refused(tmp_path: Path) -> None:
    model = lora_bert()
    folder = broadcast(tmp_path, model, "fedit")
    other = start_of(model)
    layout = other.layout()
    write_adapter(other.with_row(torch.ones(layout.size), layout), folder)
    with pytest.raises(FedcoreError, match=r"tensors are not those that broadcast\.json announces"):
        FederatedClient(model).receive(folder)


@pytest.mark.parametrize("kind", ["folder", "adapter", "row"])
def test_a_bare_adapter_needs_method_and_round(tmp_path: Path, kind: str) -> None:
    model = lora_bert()
    adapter = start_of(model)
    layout = adapter.layout()
    row = torch.full((layout.size,), 0.5)
    whole = adapter.with_row(row, layout)
    source = {
        "folder": write_adapter(whole, tmp_path / "bare"),
        "adapter": whole,
        "row": row,
    }[kind]
    with pytest.raises(FedcoreError, match="pass method and round"):
        FederatedClient(model).receive(source)
    client = FederatedClient(model, method="RoLoRA", round=1)
    client.receive(source)
    assert all(bool((t == 0.5).all()) for t in live_adapter(model).to_peft().values())
    assert flags(model)["base_model.model.classifier.modules_to_save.default.weight"]
    assert not any(trains for key, trains in flags(model).items() if "lora_B" in key)


@pytest.mark.parametrize("method", ["flora", "fedex", "florist"])
def test_a_bare_adapter_lacks_the_update_of_the_base_weights(tmp_path: Path, method: str) -> None:
    model = lora_bert()
    adapter = start_of(model)
    FederatedClient(model, method=method, round=0).receive(adapter)
    with pytest.raises(FedcoreError, match=f"{method} updates base weights, and source"):
        FederatedClient(model, method=method, round=1).receive(adapter)


def test_private_factors_stay_with_the_client_and_come_back(tmp_path: Path) -> None:
    folder = broadcast(tmp_path, lora_bert(), "fedsa")
    with pytest.raises(FedcoreError, match=r"fedsa leaves \d+ tensors .* pass private"):
        FederatedClient(lora_bert()).receive(folder)
    model = lora_bert()
    client = FederatedClient(model, private=tmp_path / "own")
    client.receive(folder)
    trainer(model, tmp_path, client, "site-1").train()
    sent = load_file(client.upload(tmp_path / "up") / "adapter_model.safetensors")
    assert all("lora_A" in key for key in sent)
    trained = live_adapter(model).to_peft()
    model = lora_bert()
    client = FederatedClient(model, private=tmp_path / "own")
    client.receive(broadcast(tmp_path, lora_bert(), "fedsa", 1, fill=0.5))
    found = live_adapter(model).to_peft()
    for key, tensor in found.items():
        expected = torch.full_like(tensor, 0.5) if "lora_A" in key else trained[key]
        assert torch.equal(tensor, expected), key


def test_the_number_of_examples_can_be_given_and_has_to_be_known(tmp_path: Path) -> None:
    model = lora_bert()
    client = FederatedClient(model)
    client.receive(broadcast(tmp_path, model, "fedit"))
    with pytest.raises(FedcoreError, match="the number of examples is not known"):
        client.upload(tmp_path / "up")
    with pytest.raises(FedcoreError, match="examples: its weight is nan"):
        FederatedClient(model, examples=float("nan"))
    client = FederatedClient(model, examples=77)
    client.receive(broadcast(tmp_path, model, "fedit"))
    trainer(model, tmp_path, client, "site-1").train()
    client.upload(tmp_path / "up")
    assert json.loads((tmp_path / "up" / "upload.json").read_text())["examples"] == 77


def logits(model: nn.Module) -> Tensor:
    tokens = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=tokens).logits
    return found


def test_a_residual_is_applied_and_taken_off_at_the_end(tmp_path: Path) -> None:
    model = lora_bert()
    adapter = start_of(model)
    module = adapter.layout().modules[0]
    torch.manual_seed(0)
    part = LowRank(torch.randn(2, 24), torch.randn(2, 24))
    folder = write_broadcast(
        BroadcastFolder(adapter, 1, "flora", residual={module: part}), tmp_path / "global"
    )
    plain, weights = logits(model), flags(model)
    with FederatedClient(model) as client:
        client.receive(folder)
        changed = logits(model)
    assert not torch.allclose(plain, changed)
    assert torch.equal(plain, logits(model))
    assert flags(model) == weights
    # The same as adding s outer^T inner to the weight.
    with torch.no_grad():
        layer = dict(model.get_base_model().named_modules())[module]
        layer.base_layer.weight += 2.0 * part.outer.T @ part.inner  # s = 6 / 3
    torch.testing.assert_close(logits(model), changed)


@pytest.mark.parametrize(
    ("module", "part", "message"),
    [
        ("bert.pooler", LowRank(torch.ones(2, 24), torch.ones(2, 24)), "has no such module"),
        (None, LowRank(torch.ones(2, 28), torch.ones(2, 24)), "28 x 24; the adapter's is 24 x 24"),
        (None, LowRank(torch.ones(2, 24), torch.full((2, 24), torch.inf)), "are not finite"),
    ],
)
def test_a_residual_of_another_model_is_refused_before_anything_changes(
    tmp_path: Path, module: str | None, part: LowRank, message: str
) -> None:
    model = lora_bert()
    adapter = start_of(model)
    layout = adapter.layout()
    moved = adapter.with_row(torch.ones(layout.size), layout)
    residual = {module or layout.modules[0]: part}
    folder = write_broadcast(
        BroadcastFolder(moved, 1, "flora", residual=residual), tmp_path / "global"
    )
    plain = logits(model)
    with pytest.raises(FedcoreError, match=f"the residual of .*{message}"):
        FederatedClient(model).receive(folder)
    assert torch.equal(logits(model), plain)


def test_a_trainer_that_shows_no_optimiser_is_refused(tmp_path: Path) -> None:
    model = lora_bert()
    client = FederatedClient(model)
    client.receive(broadcast(tmp_path, model, "fedit"))
    with pytest.raises(FedcoreError, match="shows its callbacks no optimiser"):
        client.on_train_begin(None, None, None, optimizer=None)


def test_a_folder_that_holds_something_else_is_not_overwritten(tmp_path: Path) -> None:
    model = lora_bert()
    client = FederatedClient(model, examples=1)
    client.receive(broadcast(tmp_path, model, "fedit"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(FedcoreError, match=r"holds no upload.json; pass another folder"):
        client.upload(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_a_model_without_adapter_or_with_two_is_refused() -> None:
    with pytest.raises(FedcoreError, match="the model has adapters none"):
        FederatedClient(bert())
    model = lora_bert()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(FedcoreError, match=r"has adapters \['default', 'second'\]"):
        FederatedClient(model)
