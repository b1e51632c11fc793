"""Per-sample gradients are what autograd gives for one example at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fedcore.data.low_rank import LowRank
from fedcore.errors import FedcoreError
from fedcore.training.binding import ModelBinding
from fedcore.training.forward import Forward
from fedcore.training.prefix import FrozenPrefix
from fedcore.training.residual import FrozenResidual
from fedcore.training.sample_gradients import sample_gradients
from fedcore.tuners import GramConfig, TriConfig
from tests.training.prefix_models import MODELS, examples

DATA = examples(6)
KINDS = {
    "gram": lambda **more: GramConfig(**more),
    "gram without offset": lambda **more: GramConfig(offset=False, **more),
    "gram, dense frames": lambda **more: GramConfig(frame="qr", **more),
    "gram, rslora": lambda **more: GramConfig(use_rslora=True, **more),
    "tri core": lambda **more: TriConfig(init="xs", **more),
    "tri all": lambda **more: TriConfig(init="random", train_A=True, train_B=True, **more),
    "tri A and R": lambda **more: TriConfig(init="random", train_A=True, train_B=False, **more),
    "lora": lambda **more: LoraConfig(init_lora_weights=False, **more),
    "lora, rslora": lambda **more: LoraConfig(init_lora_weights=False, use_rslora=True, **more),
}


def classifier(kind: str, family: str = "bert", layers: list[int] | None = None) -> nn.Module:
    """A tiny classifier in fp64 with the adapter ``kind``, its factors away from their start."""
    build, targets = MODELS[family]
    torch.manual_seed(0)
    fields = {"r": 2, "lora_alpha": 6, "target_modules": targets, "task_type": "SEQ_CLS"}
    model = get_peft_model(build(), KINDS[kind](layers_to_transform=layers, **fields))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return without_dropout(model.double())


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model.train()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def one_by_one(forward: Forward, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Autograd, example by example."""
    rows = []
    for i in range(len(DATA)):
        batch = torch.tensor([i])
        loss = nn.functional.cross_entropy(forward(batch), DATA.labels[batch])
        rows.append(torch.autograd.grad(loss, list(parameters.values())))
    stacked = [torch.stack(row) for row in zip(*rows, strict=True)]
    return dict(zip(parameters, stacked, strict=True))


def hooked(model: nn.Module, forward: Forward, parameters: dict[str, nn.Parameter]):
    with sample_gradients(model, parameters) as gradients:
        logits = forward(torch.arange(len(DATA)))
        return gradients.of(nn.functional.cross_entropy(logits, DATA.labels, reduction="none"))


def assert_right(model: nn.Module, forward: Forward | None = None) -> None:
    forward = forward or Forward(model, DATA)
    parameters = trained(model)
    expected = one_by_one(forward, parameters)
    found = hooked(model, forward, parameters)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float(gradient.abs().amax()) > 0, name
        assert not torch.allclose(gradient[0], gradient[1]), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_each_adapter_has_the_gradients_of_single_examples(kind):
    assert_right(classifier(kind))


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
@pytest.mark.parametrize("kind", ["gram", "tri all", "lora"])
def test_so_it_does_in_other_models(kind, family):
    assert_right(classifier(kind, family))


@pytest.mark.parametrize("kind", ["gram", "tri core", "lora"])
def test_behind_a_cached_prefix(kind):
    model = classifier(kind, layers=[3])
    prefix = FrozenPrefix.find(model)
    assert prefix is not None
    assert prefix.length == 3
    forward = Forward(model, DATA, prefix, prefix.compute(DATA, 4))
    forward.train()
    assert forward.reuses_prefix
    plain = one_by_one(Forward(model, DATA), trained(model))
    assert_right(model, forward)
    for name, gradient in hooked(model, forward, trained(model)).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["gram", "lora"])
def test_beside_a_frozen_residual(kind):
    model = classifier(kind)
    modules = ModelBinding.of(model).layout.modules
    residual = FrozenResidual(model, modules)
    before = hooked(model, Forward(model, DATA), trained(model))
    generator = torch.Generator().manual_seed(3)
    parts = {
        m: LowRank(*torch.randn(2, 1, 16, generator=generator, dtype=torch.float64))
        for m in modules
    }
    residual.load(parts)
    assert_right(model)
    after = hooked(model, Forward(model, DATA), trained(model))
    assert all(not torch.allclose(before[name], after[name]) for name in before)


@pytest.mark.parametrize("factors", ["A", "B"])
def test_with_one_factor_frozen_for_the_round(factors):
    model = classifier("lora")
    ModelBinding.of(model).trained(factors)
    assert all(f"lora_{factors}" in n or "classifier" in n or "score" in n for n in trained(model))
    assert_right(model)


def test_in_fp32_they_are_right_to_rounding():
    wide = classifier("gram")
    expected = one_by_one(Forward(wide, DATA), trained(wide))
    model = copy.deepcopy(wide).float()
    found = hooked(model, Forward(model, DATA), trained(model))
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        gap = (found[name] - gradient).norm() / gradient.norm()
        assert float(gap) < 1e-5, name


def test_the_model_is_left_as_it_was():
    model = classifier("gram")
    forward = Forward(model, DATA)
    before = one_by_one(forward, trained(model))
    with pytest.raises(IndexError), sample_gradients(model, trained(model)):
        forward(torch.tensor([0, len(DATA)]))
    assert all(p.grad is None for p in model.parameters())
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    for name, gradient in one_by_one(forward, trained(model)).items():
        assert torch.equal(gradient, before[name])


class Twice(nn.Module):
    """Multiplies by a weight in the module that owns it and again outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(x) @ self.inner.weight
        return found


def test_a_weight_used_outside_of_its_module_is_found_out():
    # Opacus itself gives gradients without a word.
    torch.manual_seed(0)
    model = Twice().train()
    with sample_gradients(model, trained(model)) as gradients:
        losses = model(torch.randn(5, 4)).square().sum(1)
        with pytest.raises(FedcoreError, match=r"inner\.weight do not add up"):
            gradients.of(losses)
        assert model.inner.weight.grad_sample.shape == (5, 4, 4)


def test_a_parameter_without_gradients_is_named():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}).train()
    with sample_gradients(model, trained(model)) as gradients:
        losses = model["used"](torch.ones(4, 3)).sum(1)
        with pytest.raises(FedcoreError, match=r"idle\.weight has no gradient for each of 4"):
            gradients.of(losses)


def test_exactly_the_trained_parameters_are_to_be_named():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).train()
    everything = trained(model)
    some = {name: p for name, p in everything.items() if name.startswith("0.")}
    with pytest.raises(FedcoreError, match=r"trains 1\.weight"), sample_gradients(model, some):
        pass
    model[1].requires_grad_(False)
    with (
        pytest.raises(FedcoreError, match=r"1\.weight does not train"),
        sample_gradients(model, everything),
    ):
        pass


def test_layers_that_mix_examples_are_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train()
    with (
        pytest.raises(FedcoreError, match="no per-sample gradients"),
        sample_gradients(model, trained(model)),
    ):
        pass
