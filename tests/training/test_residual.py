"""A frozen low-rank update beside the base weights: forward, exchange, removal."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedcore.data.low_rank import LowRank, accumulated, total
from fedcore.errors import FedcoreError
from fedcore.training.residual import FrozenResidual


class Two(nn.Module):
    """A Linear of 5 to 7 and a Conv1D of 7 to 3."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = Conv1D(3, 7)

    def forward(self, x):
        return self.second(self.first(x))


def wrapped(dtype=torch.float64):
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["first", "second"])
    model = get_peft_model(Two().to(dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model.eval()


def parts(rank=3):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "first": LowRank(draw(rank, 7), draw(rank, 5)),
        "second": LowRank(draw(rank, 3), draw(rank, 7)),
    }


def with_dense(model, residual):
    """A copy of the model with the residual added to its base weights, in their orientation."""
    base = model.base_model.model
    with torch.no_grad():
        for name, part in residual.items():
            layer = getattr(base, name)
            update = layer.scaling["default"] * part.outer.T @ part.inner
            # A Conv1D stores its weight as (in, out).
            layer.base_layer.weight += update if name == "first" else update.T
    return model


def test_the_forward_pass_is_that_of_the_updated_base_weights():
    x = torch.randn(4, 5, dtype=torch.float64)
    model, residual = wrapped(), parts()
    FrozenResidual(model, ("first", "second")).load(residual)
    torch.testing.assert_close(model(x), with_dense(wrapped(), residual)(x), rtol=1e-12, atol=1e-12)


def test_a_second_residual_replaces_the_first_and_none_removes_it():
    x = torch.randn(4, 5, dtype=torch.float64)
    model = wrapped()
    plain = model(x)
    frozen = FrozenResidual(model, ("first", "second"))
    frozen.load(parts(3))
    changed = model(x)
    frozen.load(parts(3))
    assert torch.equal(model(x), changed)
    frozen.load({})
    assert torch.equal(model(x), plain)
    assert not torch.allclose(changed, plain)


def test_base_weights_and_trained_parameters_stay_what_they_were():
    model = wrapped()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    FrozenResidual(model, ("first",)).load({"first": parts()["first"]})
    model(torch.randn(2, 5, dtype=torch.float64)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_half_precision_base_keeps_a_residual_below_its_resolution():
    # 1e-4 of a weight is lost in bf16; beside the weight it is not.
    model = wrapped(torch.bfloat16)
    residual = {"first": LowRank(*(1e-2 * p.float() for p in parts()["first"]))}
    first = model.base_model.model.first
    x = torch.eye(5, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in (first.base_layer.weight, first.base_layer.bias):
            parameter.zero_()
        first.lora_B["default"].weight.zero_()
        FrozenResidual(model, ("first",)).load(residual)
        found = first(x).float()
    expected = 3 * residual["first"].inner.T @ residual["first"].outer
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-6)


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(FedcoreError, match="no module third"):
        FrozenResidual(wrapped(), ("third",))


@pytest.mark.parametrize("ranks", [(1, 2), (3, 3), (4, 9), (1, 1, 1, 1, 1, 1, 1)])
def test_a_sum_keeps_the_product_and_never_outgrows_the_smaller_side(ranks):
    generator = torch.Generator().manual_seed(2)
    summands = [
        LowRank(
            torch.randn(r, 5, generator=generator, dtype=torch.float64),
            torch.randn(r, 8, generator=generator, dtype=torch.float64),
        )
        for r in ranks
    ]
    found = total(summands)
    dense = sum(part.outer.T @ part.inner for part in summands)
    torch.testing.assert_close(found.outer.T @ found.inner, dense, rtol=1e-12, atol=1e-12)
    assert found.rank == min(sum(ranks), 5)


def test_nothing_is_accumulated_of_rank_zero():
    empty = LowRank(torch.zeros(0, 7), torch.zeros(0, 5))
    assert accumulated({}, {"first": empty}) == {}
    held = parts()
    assert accumulated(held, {"first": empty})["first"] is held["first"]
