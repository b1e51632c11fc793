from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from transformers.pytorch_utils import Conv1D

from fedcore.errors import FedcoreError
from fedcore.tuners import GramConfig, GramLayer
from tests.tuners.tiny import dense_update, linear_layer

SHAPES = [(7, 5), (5, 7), (6, 6), (1, 9)]


def inputs(width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(4, 3, width, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fields", [{}, {"offset": False}, {"use_rslora": True}, {"frame": "qr"}])
def test_forward_is_the_dense_update(shape, fields):
    layer = linear_layer(*shape, **fields)
    x = inputs(shape[1])
    weight = layer.base_layer.weight + dense_update(layer)
    expected = nn.functional.linear(x, weight, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)
    assert layer.scaling["default"] == pytest.approx(12 / (3**0.5 if "use_rslora" in fields else 3))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_the_formula_in_factor_space(shape):
    layer = linear_layer(*shape)
    x = inputs(shape[1]).reshape(-1, shape[1])
    outer = torch.randn(12, shape[0], generator=torch.Generator().manual_seed(8)).double()
    layer(x).backward(outer)
    factor, frame, scaling = layer.gram_A["default"], layer.frame("default"), layer.scaling
    identity = torch.eye(factor.shape[1], dtype=torch.float64)
    x_k = x @ frame.times_right(identity).T
    g_k = outer @ frame.times_left_t(identity).T
    with torch.no_grad():
        x_r, g_r = x_k @ factor.T, g_k @ factor.T
        expected = scaling["default"] * (g_r.T @ x_k + x_r.T @ g_k)
    torch.testing.assert_close(factor.grad, expected, atol=1e-11, rtol=1e-11)


def test_only_the_factor_trains():
    layer = linear_layer()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["gram_A.default"]
    names = ["gram_A.default", "gram_A0.default", "base_layer.weight", "base_layer.bias"]
    assert sorted(layer.state_dict()) == sorted(names)


def batch_gradient(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    loss = layer(x).square().sum()
    return torch.autograd.grad(loss, layer.get_parameter("gram_A.default"))[0]


def test_per_sample_gradients_add_up_to_the_batch_gradient():
    layer = linear_layer()
    x = inputs(5)

    def loss(factor, sample):
        return functional_call(layer, {"gram_A.default": factor}, (sample,)).square().sum()

    single = vmap(grad(loss), in_dims=(None, 0))(layer.gram_A["default"], x)
    assert single.shape == (4, 3, 5)
    torch.testing.assert_close(single.sum(0), batch_gradient(layer, x), atol=1e-11, rtol=1e-11)


def test_the_module_that_owns_the_factor_computes_with_it():
    # The way hook-based per-sample gradients work: the leaf alone, stateless, on recorded inputs.
    layer = linear_layer()
    x, recorded = inputs(5), []
    layer.gram_A.register_forward_hook(lambda _m, args, _out: recorded.append(args[0]))
    out = layer(x)
    upstream = 2 * out.detach()
    expected = torch.autograd.grad(out.square().sum(), layer.gram_A["default"])[0]
    stateless = copy.deepcopy(layer.gram_A).to("meta")

    def loss(factor, sample, signal):
        return (functional_call(stateless, {"default": factor}, (sample,)) * signal).sum()

    single = vmap(grad(loss), in_dims=(None, 0, 0))
    found = single(layer.gram_A["default"], recorded[0], upstream)
    torch.testing.assert_close(found.sum(0), expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_start_is_the_base_layer_to_the_bit(dtype):
    base = nn.Linear(48, 40).to(dtype)
    x = inputs(48, torch.float32).to(dtype)
    expected = base(x)
    layer = GramLayer(base, "default", "m", GramConfig(r=4, lora_alpha=64, init_std=1.0))
    assert torch.equal(layer(x), expected)
    assert layer.gram_A["default"].dtype == torch.float32


def test_without_offset_the_start_is_off_by_the_initial_product():
    layer = GramLayer(nn.Linear(6, 6), "default", "m", GramConfig(r=2, offset=False))
    x = inputs(6, torch.float32)
    moved = (layer(x) - layer.base_layer(x)).double()
    torch.testing.assert_close(moved, x.double() @ dense_update(layer).T, atol=1e-6, rtol=0)
    assert moved.norm() > 1e-3 * x.norm()


def test_half_base_keeps_the_update():
    layer = linear_layer(40, 30, dtype=torch.bfloat16)
    x = inputs(30, torch.float32).bfloat16()
    out = layer(x)
    assert out.dtype == torch.bfloat16
    exact = layer.base_layer(x).double() + x.double() @ dense_update(layer).T
    assert (out.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize("fields", [{}, {"frame": "qr"}])
def test_casting_the_model_to_half_leaves_adapter_and_frame_alone(fields):
    layer = linear_layer(40, 30, dtype=torch.float32, **fields)
    before = dense_update(layer)
    layer.to(torch.bfloat16)
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert torch.equal(dense_update(layer), before)
    identity = torch.eye(30)
    left = layer.frame("default").times_left_t(identity).double()
    assert (left @ left.T - torch.eye(30)).abs().max() <= 1e-6


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_merge_adds_the_update_in_the_weights_own_orientation(shape, conv):
    out_features, in_features = shape
    torch.manual_seed(0)
    base = Conv1D(out_features, in_features) if conv else nn.Linear(in_features, out_features)
    layer = GramLayer(base.double(), "default", "m", GramConfig(r=2)).double()
    with torch.no_grad():
        layer.gram_A["default"] += 0.5
    original, x = base.weight.detach().clone(), inputs(in_features)
    expected = layer(x)
    layer.merge(safe_merge=True)
    assert layer.merged
    delta = dense_update(layer)
    moved = base.weight.detach() - original
    torch.testing.assert_close(moved, delta.T if conv else delta, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)
    layer.unmerge()
    torch.testing.assert_close(base.weight.detach(), original, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_safe_merge_refuses_nan_before_it_changes_anything():
    layer = linear_layer()
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.gram_A["default"][0, 0] = float("nan")
    with pytest.raises(FedcoreError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


def test_quantised_base_runs_and_refuses_to_merge():
    class Quantised(nn.Module):
        in_features, out_features = 5, 7

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(7, 5, dtype=torch.int8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype))

    layer = GramLayer(Quantised(), "default", "m", GramConfig(r=2))
    with torch.no_grad():
        layer.gram_A["default"] += 0.5
    x = inputs(5)
    expected = x @ (torch.ones(7, 5) + dense_update(layer)).T
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=0)
    with pytest.raises(FedcoreError, match=r"int8.*export_lora"):
        layer.merge()


def test_initial_factor_depends_on_seed_and_module_only():
    def start(module: str, **fields) -> torch.Tensor:
        torch.manual_seed(torch.seed())
        layer = GramLayer(nn.Linear(64, 48), "x", module, GramConfig(r=4, **fields))
        assert torch.equal(layer.gram_A["x"], layer.gram_A0["x"])
        assert layer.gram_A["x"].data_ptr() != layer.gram_A0["x"].data_ptr()
        return layer.gram_A0["x"]

    first = start("a")
    assert torch.equal(first, start("a"))
    assert torch.equal(first, start("a", frame_seed=5))
    assert not torch.equal(first, start("b"))
    assert not torch.equal(first, start("a", init_seed=1))
    assert first.std().item() == pytest.approx(0.1 / 48**0.5, rel=0.2)
    assert start("a", init_std=0.5).std().item() == pytest.approx(0.5, rel=0.2)


def test_size_of_the_initial_product_in_the_literature():
    sizes = []
    for module in "abcdefgh":
        config = GramConfig(r=4, lora_alpha=16, init_std=0.01, offset=False)
        layer = GramLayer(nn.Linear(1024, 1024, bias=False), "default", module, config)
        factor = layer.gram_A["default"].detach().double()
        sizes.append(layer.scaling["default"] * (factor @ factor.T).norm().item())
    assert 0.80 <= sum(sizes) / len(sizes) <= 0.86
    assert max(sizes) - min(sizes) < 0.12


def steps(layer: GramLayer, optimiser: torch.optim.Optimizer, count: int) -> torch.Tensor:
    x = inputs(layer.in_features)
    target = torch.randn(4, 3, layer.out_features, generator=torch.Generator().manual_seed(6))
    for _ in range(count):
        optimiser.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimiser.step()
    return torch.linalg.svdvals(layer.gram_A["default"].detach())


@pytest.mark.parametrize("offset", [True, False])
def test_rank_never_grows_under_sgd_and_revives_under_adam(offset):
    def deficient() -> GramLayer:
        layer = linear_layer(12, 10, r=4, offset=offset)
        with torch.no_grad():
            u, s, vt = torch.linalg.svd(layer.gram_A["default"], full_matrices=False)
            layer.gram_A["default"].copy_((u[:, :2] * s[:2]) @ vt[:2])
        return layer

    layer = deficient()
    start = torch.linalg.svdvals(layer.gram_A["default"].detach())
    after = steps(layer, torch.optim.SGD(layer.gram_A.parameters(), lr=0.05), 20)
    assert (after[2:] <= 1e-13 * start[0]).all()
    assert (after[:2] - start[:2]).abs().max() > 1e-2
    layer = deficient()
    after = steps(layer, torch.optim.Adam(layer.gram_A.parameters(), lr=0.05), 20)
    assert after[2] > 1e-2


def test_zero_factor_has_no_gradient():
    layer = linear_layer()
    with torch.no_grad():
        layer.gram_A["default"].zero_()
    assert batch_gradient(layer, inputs(5)).abs().max() <= 1e-14


def test_rank_above_the_width_and_width_equal_to_the_rank():
    for shape, rank in (((4, 6), 9), ((3, 8), 3)):
        layer = linear_layer(*shape, r=rank)
        x = inputs(shape[1])
        delta = (layer(x) - layer.base_layer(x)).detach()
        torch.testing.assert_close(delta, x @ dense_update(layer).T, atol=1e-11, rtol=0)


def test_layer_that_cannot_carry_an_adapter_is_named():
    with pytest.raises(FedcoreError, match=r"module word is a Embedding"):
        GramLayer(nn.Embedding(3, 4), "default", "word", GramConfig())
