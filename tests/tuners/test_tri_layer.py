from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from transformers.pytorch_utils import Conv1D

from fedcore.errors import FedcoreError
from fedcore.tuners import TriConfig, TriLayer
from tests.tuners.tri_tiny import STARTS, dense_product, held_factors, move_factors, tri_linear

SHAPES = [(7, 5), (5, 7), (6, 6), (3, 9), (9, 3)]
NAMES = ("tri_A.default", "tri_R.default", "tri_B.default")


def inputs(width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(4, 3, width, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"init": "xs"}])
def test_forward_is_the_dense_update(shape, fields):
    layer = tri_linear(*shape, **fields)
    x = inputs(shape[1])
    weight = layer.base_layer.weight + dense_product(layer)
    expected = nn.functional.linear(x, weight, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)
    assert layer.scaling["default"] == pytest.approx(12 / (3**0.5 if "use_rslora" in fields else 3))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_the_formulas(shape):
    layer = tri_linear(*shape)
    x = inputs(shape[1]).reshape(-1, shape[1])
    outer = torch.randn(12, shape[0], generator=torch.Generator().manual_seed(8)).double()
    layer(x).backward(outer)
    A, R, B = held_factors(layer)
    g = layer.scaling["default"] * outer.T @ x
    expected = {"A": R.T @ B.T @ g, "R": B.T @ g @ A.T, "B": g @ A.T @ R.T}
    for name, value in expected.items():
        found = layer.factor(name)["default"].grad
        torch.testing.assert_close(found, value, atol=1e-11, rtol=1e-11)


def test_training_the_core_is_descent_along_the_projected_gradient():
    # With orthonormal bases and s = 1, a step on R moves the weight by -rate P_B g P_A exactly.
    torch.manual_seed(3)
    base = nn.Linear(11, 8, bias=False).double().requires_grad_(False)
    layer = TriLayer(base, "default", "m", TriConfig(r=4, lora_alpha=4, init="random")).double()
    A, _, B = held_factors(layer)
    A = torch.linalg.qr(A.T).Q.T
    B = torch.linalg.qr(B).Q
    with torch.no_grad():
        layer.tri_A["default"].copy_(A)
        layer.tri_B["default"].copy_(B)
    x, target = inputs(11).reshape(-1, 11), torch.randn(12, 8).double()
    weight = base.weight.clone().requires_grad_()
    rate, optimiser = 0.05, torch.optim.SGD([layer.tri_R["default"]], lr=0.05)
    for _ in range(7):
        optimiser.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimiser.step()
        loss = (x @ weight.T - target).square().mean()
        gradient = torch.autograd.grad(loss, weight)[0]
        with torch.no_grad():
            weight -= rate * (B @ B.T) @ gradient @ (A.T @ A)
    moved = (weight - base.weight).detach()
    assert moved.norm() > 1e-2
    torch.testing.assert_close(dense_product(layer), moved, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("flags", list(product([True, False], repeat=3))[:-1])
def test_what_trains_is_what_the_configuration_says(flags):
    fields = dict(zip(("train_A", "train_R", "train_B"), flags, strict=True))
    layer = tri_linear(init="xs", **fields)
    wanted = [name for name, flag in zip(NAMES, flags, strict=True) if flag]

    def trained():
        return [name for name, p in layer.named_parameters() if p.requires_grad]

    assert trained() == wanted
    layer.enable_adapters(False)
    assert trained() == []
    layer.enable_adapters(True)
    assert trained() == wanted
    layer.set_requires_grad("default", False)
    assert trained() == []
    layer.set_requires_grad("default", True)
    assert trained() == wanted
    layer.set_adapter("default", inference_mode=True)
    assert trained() == []
    layer.set_adapter("default")
    layer.float()
    assert trained() == wanted
    assert {*NAMES} <= layer.state_dict().keys()


def batch_gradients(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    loss = layer(x).square().sum()
    held = [layer.get_parameter(name) for name in NAMES]
    return dict(zip(NAMES, torch.autograd.grad(loss, held), strict=True))


def test_per_sample_gradients_add_up_to_the_batch_gradient():
    layer = tri_linear()
    x = inputs(5)

    def loss(factors, sample):
        return functional_call(layer, factors, (sample,)).square().sum()

    held = {name: layer.get_parameter(name) for name in NAMES}
    single = vmap(grad(loss), in_dims=(None, 0))(held, x)
    for name, expected in batch_gradients(layer, x).items():
        assert single[name].shape == (4, *expected.shape)
        torch.testing.assert_close(single[name].sum(0), expected, atol=1e-10, rtol=1e-10)


def test_the_modules_that_own_the_factors_compute_with_them():
    # The way hook-based per-sample gradients work: a leaf alone, stateless, on recorded inputs and
    # the gradients of its outputs. Two adapters are active.
    layer = tri_linear()
    layer.update_layer("other", "block.linear", TriConfig(r=2, lora_alpha=5))
    layer.double()
    move_factors(layer, "other")
    layer.set_adapter(["default", "other"])
    x, recorded, outputs = inputs(5), {}, {}
    for name in ("tri_A", "tri_R", "tri_B"):

        def keep(_module, args, out, name=name):
            recorded[name], outputs[name] = args[0].detach(), out

        getattr(layer, name).register_forward_hook(keep)
    loss = layer(x).square().sum()
    signals = torch.autograd.grad(loss, list(outputs.values()), retain_graph=True)
    for (name, _), signal in zip(outputs.items(), signals, strict=True):
        owner = getattr(layer, name)
        stateless = copy.deepcopy(owner).to("meta")

        def inner(factors, sample, upstream, stateless=stateless):
            return (functional_call(stateless, factors, (sample,)) * upstream).sum()

        held = dict(owner.items())
        assert set(held) == {"default", "other"}
        single = vmap(grad(inner), in_dims=(None, 0, 0))(held, recorded[name], signal)
        expected = torch.autograd.grad(loss, list(held.values()), retain_graph=True)
        for adapter, value in zip(held, expected, strict=True):
            torch.testing.assert_close(single[adapter].sum(0), value, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", ["lora", "ce", "random"])
def test_start_is_the_base_layer_to_the_bit(dtype, init):
    base = nn.Linear(48, 40).to(dtype)
    x = inputs(48, torch.float32).to(dtype)
    expected = base(x)
    layer = TriLayer(base, "default", "m", TriConfig(r=4, lora_alpha=64, init=init))
    assert torch.equal(layer(x), expected)
    assert {layer.factor(f)["default"].dtype for f in "ARB"} == {torch.float32}


@pytest.mark.parametrize("conv", [False, True])
def test_xs_holds_the_leading_part_of_the_weight(conv):
    torch.manual_seed(2)
    base = Conv1D(9, 12) if conv else nn.Linear(12, 9)
    with torch.no_grad():
        base.weight.copy_(torch.randn(base.weight.shape))
    config = TriConfig(r=4, lora_alpha=4, init="xs")
    layer = TriLayer(base, "default", "m", config)
    A, _, B = held_factors(layer)
    weight = (base.weight.T if conv else base.weight).detach().double()
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    best = (u[:, :4] * s[:4]) @ vt[:4]
    torch.testing.assert_close(B @ A, best, atol=1e-6, rtol=0)
    torch.testing.assert_close(B.T @ B, torch.eye(4).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(A @ A.T, torch.diag(s[:4] ** 2), atol=1e-5, rtol=0)
    assert (B.gather(0, B.abs().argmax(0, keepdim=True)) > 0).all()
    wide = TriLayer(nn.Linear(80, 80), "default", "m", TriConfig(r=64, init="xs"))
    core = held_factors(wide).R
    assert core.std().item() == pytest.approx(1e-5, rel=0.05)
    assert abs(core.mean().item()) < 1e-6
    again = TriLayer(base, "x", "m", TriConfig(r=4, lora_alpha=4, init="xs"))
    assert torch.equal(layer.tri_R["default"], again.tri_R["x"])


def test_starts_have_the_sizes_they_say():
    layer = TriLayer(nn.Linear(400, 300), "default", "m", TriConfig(r=8, init="ce"))
    A, R, B = held_factors(layer)
    assert A.std().item() == pytest.approx(1e-3, rel=0.05)
    assert torch.equal(R, torch.eye(8).double())
    assert B.abs().max() == 0
    A, R, B = held_factors(TriLayer(nn.Linear(400, 300), "default", "m", TriConfig(r=8)))
    assert A.abs().max().item() == pytest.approx(400**-0.5, rel=0.01)
    assert A.std().item() == pytest.approx((3 * 400) ** -0.5, rel=0.05)
    assert abs(A.mean().item()) < 2e-3
    assert torch.equal(R, torch.eye(8).double())
    assert B.abs().max() == 0
    config = TriConfig(r=8, init="random")
    A, R, B = held_factors(TriLayer(nn.Linear(400, 300), "default", "m", config))
    for gram in (A @ A.T, B.T @ B):
        torch.testing.assert_close(gram, torch.eye(8).double(), atol=1e-6, rtol=0)
    assert R.abs().max() == 0


@pytest.mark.parametrize("init", STARTS)
def test_a_start_depends_on_seed_and_module_only(init):
    def start(module: str, seed: int = 0) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        base = nn.Linear(20, 12)
        torch.manual_seed(torch.seed())
        layer = TriLayer(base, "x", module, TriConfig(r=4, init=init, init_seed=seed))
        return {f: layer.factor(f)["x"].detach() for f in "ARB"}

    first, again = start("a"), start("a")
    assert all(torch.equal(first[f], again[f]) for f in "ARB")
    drawn = "R" if init == "xs" else "A"
    for other in (start("b"), start("a", 1)):
        assert not torch.equal(first[drawn], other[drawn])


def test_half_base_keeps_the_update():
    layer = tri_linear(40, 30, dtype=torch.bfloat16, init="random")
    x = inputs(30, torch.float32).bfloat16()
    out = layer(x)
    assert out.dtype == torch.bfloat16
    exact = layer.base_layer(x).double() + x.double() @ dense_product(layer).T
    assert (out.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_casting_the_model_to_half_leaves_the_bases_alone(cast):
    layer = TriLayer(nn.Linear(40, 30), "default", "m", TriConfig(r=6, init="random"))
    before = held_factors(layer)
    layer.to(cast)
    assert layer.base_layer.weight.dtype == cast
    assert [layer.factor(f)["default"].requires_grad for f in "ARB"] == [False, True, False]
    A, R, B = held_factors(layer)
    assert torch.equal(A, before.A)
    assert torch.equal(B, before.B)
    assert torch.equal(R, before.R)
    for gram in (A @ A.T, B.T @ B):
        assert (gram - torch.eye(6)).abs().max() <= 1e-6


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_merge_adds_the_update_in_the_weights_own_orientation(shape, conv):
    out_features, in_features = shape
    torch.manual_seed(0)
    base = Conv1D(out_features, in_features) if conv else nn.Linear(in_features, out_features)
    layer = TriLayer(base.double(), "default", "m", TriConfig(r=2)).double()
    move_factors(layer)
    original, x = base.weight.detach().clone(), inputs(in_features)
    expected = layer(x)
    layer.merge(safe_merge=True)
    assert layer.merged
    delta = dense_product(layer)
    moved = base.weight.detach() - original
    torch.testing.assert_close(moved, delta.T if conv else delta, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)
    layer.unmerge()
    torch.testing.assert_close(base.weight.detach(), original, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_safe_merge_refuses_nan_before_it_changes_anything():
    layer = tri_linear()
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.tri_R["default"][0, 0] = float("nan")
    with pytest.raises(FedcoreError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


class Quantised(nn.Module):
    in_features, out_features = 5, 7

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(7, 5, dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


def test_quantised_base_runs_and_refuses_to_merge_or_to_be_decomposed():
    layer = TriLayer(Quantised(), "default", "m", TriConfig(r=2, init="random"))
    move_factors(layer)
    x = inputs(5)
    expected = x @ (torch.ones(7, 5) + dense_product(layer)).T
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=0)
    with pytest.raises(FedcoreError, match=r"int8.*export_lora"):
        layer.merge()
    with pytest.raises(FedcoreError, match=r"module m has a weight of torch.int8.*init='random'"):
        TriLayer(Quantised(), "default", "m", TriConfig(r=2, init="xs"))


@pytest.mark.parametrize("init", ["random", "xs"])
def test_bases_that_cannot_be_orthonormal_are_refused(init):
    with pytest.raises(FedcoreError, match=r"module m is 5 x 4 .* need r <= 4, r is 5"):
        TriLayer(nn.Linear(4, 5), "default", "m", TriConfig(r=5, init=init))
    layer = TriLayer(nn.Linear(4, 5), "default", "m", TriConfig(r=4, init=init))
    A, _, B = held_factors(layer)
    assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == 4


def test_a_weight_that_is_not_finite_is_refused():
    base = nn.Linear(4, 4)
    with torch.no_grad():
        base.weight[1, 2] = float("inf")
    with pytest.raises(FedcoreError, match=r"module m has a weight that is not finite"):
        TriLayer(base, "default", "m", TriConfig(r=2, init="xs"))
    with pytest.raises(FedcoreError, match=r"module m has a weight that is on the meta device"):
        TriLayer(nn.Linear(4, 4, device="meta"), "default", "m", TriConfig(r=2, init="xs"))


@pytest.mark.parametrize("init", STARTS)
def test_every_start_trains(init):
    layer = TriLayer(nn.Linear(10, 12).double(), "default", "m", TriConfig(r=3, init=init)).double()
    layer.base_layer.requires_grad_(False)
    trained = [p for p in layer.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=0.05)
    target = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(6)).double()
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = (layer(inputs(10)) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]


def test_rank_above_the_width_where_bases_need_not_be_orthonormal():
    layer = tri_linear(4, 6, r=9)
    x = inputs(6)
    delta = (layer(x) - layer.base_layer(x)).detach()
    torch.testing.assert_close(delta, x @ dense_product(layer).T, atol=1e-11, rtol=0)


def test_layer_that_cannot_carry_an_adapter_is_named():
    with pytest.raises(FedcoreError, match=r"module word is a Embedding"):
        TriLayer(nn.Embedding(3, 4), "default", "word", TriConfig())


def test_a_layer_that_waits_for_its_statistic_says_so():
    layer = TriLayer(nn.Linear(4, 5), "default", "m", TriConfig(r=2, init="sb"))
    with pytest.raises(FedcoreError, match=r"'default' takes its factors from a statistic .*apply"):
        layer(inputs(4, torch.float32))
    with pytest.raises(FedcoreError, match="apply_sb"):
        layer.merge()
    layer.enable_adapters(False)
    layer(inputs(4, torch.float32))
