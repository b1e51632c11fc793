"""The gradients that uploads show, against the dense gradient and the written formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fedcore.audit.network import UPLOADS, Base, adapt
from fedcore.errors import FedcoreError

WIDTHS = (7, 9, 6, 4)
SCALING = 1.7


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network_of(upload: str, seed: int = 0, rank: int = 3):
    """A network away from its start: every factor but the frames has moved."""
    generator = random(seed)
    network = adapt(Base.draw(WIDTHS, generator), upload, rank, SCALING, generator)
    moved = {
        name: values + 0.3 * torch.randn(values.shape, generator=generator, dtype=values.dtype)
        for name, values in network.trained.items()
    }
    return network.with_parameters(moved)


def batch_of(size: int, seed: int = 1):
    generator = random(seed)
    pictures = torch.rand(size, WIDTHS[0], generator=generator, dtype=torch.float64)
    return pictures, torch.randint(WIDTHS[-1], (size,), generator=generator)


def dense_gradients(dense: Base, pictures, labels):
    """``d loss / d W`` and ``d loss / d b`` of a plain network, written out layer by layer."""
    weights = [w.detach().clone().requires_grad_() for w in dense.weights]
    biases = [b.detach().clone().requires_grad_() for b in dense.biases]
    x = pictures
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        x = (F.gelu(x) if i else x) @ w.T + b
    loss = -torch.log_softmax(x, 1)[torch.arange(len(labels)), labels].mean()
    found = torch.autograd.grad(loss, [*weights, *biases])
    return found[: len(weights)], found[len(weights) :]


@pytest.mark.parametrize("upload", UPLOADS)
@pytest.mark.parametrize("size", [1, 5])
def test_the_gradient_is_the_formula_on_the_dense_one(upload, size):
    network = network_of(upload)
    pictures, labels = batch_of(size)
    dense = network.effective(network.parameters)
    weights, biases = dense_gradients(dense, pictures, labels)
    expected = []
    for layer, (G, g) in enumerate(zip(weights, biases, strict=True)):
        p = {n.split(".")[1]: v for n, v in network.parameters.items() if n[0] == str(layer)}
        if upload == "full":
            expected += [G, g]
        elif upload == "lora":
            expected += [SCALING * p["B"].T @ G, SCALING * G @ p["A"].T]
        elif upload == "ffa":
            expected += [SCALING * G @ p["A"].T]
        elif upload == "florg":
            P = p["left"].T @ G @ p["right"].T
            expected += [SCALING * p["A"] @ (P + P.T)]
        else:
            expected += [SCALING * p["B"].T @ G @ p["A"].T]
    expected = torch.cat([part.flatten() for part in expected])
    other = torch.rand(pictures.shape, generator=random(9), dtype=torch.float64)
    found = network.gradient(torch.stack([pictures, other]), labels)
    assert found.shape == (2, network.numbers)
    assert float((found[0] - expected).norm()) <= 1e-13 * float(expected.norm())
    again = network.gradient(other[None], labels)[0]
    assert torch.allclose(found[1], again, rtol=1e-12, atol=1e-15)
    assert float((again - expected).norm()) > 1e-3 * float(expected.norm())


def test_each_upload_sends_what_its_method_sends():
    numbers = {name: network_of(name).numbers for name in UPLOADS}
    pairs = [(7, 9), (9, 6), (6, 4)]
    assert numbers == {
        "full": sum(i * o + o for i, o in pairs),
        "lora": sum(3 * (i + o) for i, o in pairs),
        "ffa": sum(3 * o for _, o in pairs),
        "florg": sum(3 * min(i, o) for i, o in pairs),
        "ce_lora": 3 * 9,
    }


@pytest.mark.parametrize("upload", UPLOADS)
def test_adapters_start_at_the_base_and_some_show_nothing_there(upload):
    generator = random(2)
    base = Base.draw(WIDTHS, generator)
    network = adapt(base, upload, 3, SCALING, generator)
    dense = network.effective(network.parameters)
    for found, expected in zip(dense.weights, base.weights, strict=True):
        assert torch.allclose(found, expected, atol=1e-15)
    pictures, labels = batch_of(3)
    gradient = network.gradient(pictures[None], labels)[0]
    if upload == "ce_lora":
        assert not gradient.any()
        assert network.directions(pictures, labels) == 0
    elif upload == "lora":
        sizes = [values.numel() for values in network.sent.values()]
        for name, part in zip(network.sent, gradient.split(sizes), strict=True):
            assert bool(part.any()) == name.endswith("B")
    else:
        assert gradient.any()


def test_frames_are_isometries():
    for wide, out in ((7, 4), (4, 7), (5, 5)):
        network = adapt(Base.draw((wide, out), random(0)), "florg", 2, 1.0, random(1))
        k = min(wide, out)
        left, right = network.parameters["0.left"], network.parameters["0.right"]
        assert left.shape == (out, k)
        assert right.shape == (k, wide)
        eye = torch.eye(k, dtype=torch.float64)
        assert torch.allclose(left.T @ left, eye, atol=1e-14)
        assert torch.allclose(right @ right.T, eye, atol=1e-14)


def test_a_core_shows_batch_times_2r_minus_batch_directions_a_layer():
    """``s B^T G A^T`` of a batch of b has rank b: b (2r - b) numbers of it are free."""
    generator = random(3)
    for layers, rank, size in ((1, 4, 1), (2, 4, 1), (2, 4, 2)):
        base = Base.draw((30,) * (layers + 1), generator)
        network = adapt(base, "ce_lora", rank, 1.0, generator)
        moved = {
            name: torch.randn(values.shape, generator=generator, dtype=values.dtype) / 5
            for name, values in network.trained.items()
        }
        network = network.with_parameters(moved)
        pictures = torch.rand(size, 30, generator=generator, dtype=torch.float64)
        labels = torch.arange(size)
        found = network.directions(pictures, labels)
        assert found == layers * size * (2 * rank - size)
        assert found < network.numbers


def test_an_unknown_upload_is_refused():
    with pytest.raises(FedcoreError, match="unknown upload 'flor'; did you mean"):
        adapt(Base.draw(WIDTHS, random(0)), "flor", 2, 1.0, random(0))
