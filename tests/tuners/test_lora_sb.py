from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from fedcore.errors import FedcoreError
from fedcore.tuners import apply_sb, first_step_statistics, sb_factors
from tests.tuners.tiny import BUILD, gpt2, logits
from tests.tuners.tri_tiny import dense_product, held_factors, tri_adapted, tri_layers


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 8), st.integers(0, 2**20))
def test_factors_are_the_best_of_their_rank_with_orthonormal_bases(p, q, true_rank, seed):
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)[:, :, :true_rank]
    statistic = (inner[0] @ inner[1].T)[:p, :q]
    for rank in range(1, min(p, q) + 1):
        A, R, B = (factor.double() for factor in sb_factors(statistic, rank))
        identity = torch.eye(rank).double()
        torch.testing.assert_close(A @ A.T, identity, atol=1e-6, rtol=0)
        torch.testing.assert_close(B.T @ B, identity, atol=1e-6, rtol=0)
        assert torch.equal(R, torch.diag(R.diagonal()))
        assert (R.diagonal() >= 0).all()
        tail = torch.linalg.svdvals(statistic)[rank:].norm()
        scale = statistic.norm() + 1
        assert abs(float((statistic - B @ R @ A).norm() - tail)) <= 1e-5 * scale


@pytest.mark.parametrize(
    ("statistic", "rank", "message"),
    [
        (torch.zeros(3), 1, r"statistic has shape \(3,\)"),
        (torch.tensor([[1.0, float("nan")]]), 1, r"pass a finite matrix"),
        (torch.zeros(3, 2), 3, r"need r <= 2, r is 3"),
    ],
)
def test_a_bad_statistic_is_refused(statistic, rank, message):
    with pytest.raises(FedcoreError, match=message):
        sb_factors(statistic, rank)


def batches(name: str):
    """Summed losses of two batches of different size, and the tokens they come from."""
    tokens = torch.randint(0, 61, (5, 6), generator=torch.Generator().manual_seed(2))
    labels = tokens if name != "bert" else torch.tensor([0, 2, 1, 1, 0])

    def loss(rows):
        def of(model):
            return model(tokens[rows], labels=labels[rows]).loss * len(tokens[rows])

        return of

    return [loss(slice(0, 2)), loss(slice(2, 5))], loss(slice(0, 5))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_statistics_are_the_signs_of_the_summed_gradient(name):
    several, whole = batches(name)
    model = tri_adapted(name, init="sb")
    flags = [p.requires_grad for p in model.parameters()]
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = first_step_statistics(model, several, 0.25)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(state[key], t) for key, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    base = BUILD[name]()
    whole(base).backward()
    assert found.keys() == model.peft_config["default"].module_shapes.keys()
    for module, statistic in found.items():
        gradient = base.get_submodule(module).weight.grad
        upright = gradient.T if name == "gpt2" else gradient
        shape = model.peft_config["default"].module_shapes[module]
        assert list(statistic.shape) == shape
        clear = upright.abs() > 1e-5 * upright.abs().max()
        assert torch.equal(statistic[clear], -0.25 * upright.sign()[clear])
        assert clear.double().mean() > 0.9


def test_statistics_are_those_of_the_base_model_whatever_the_adapter():
    several, _ = batches("bert")
    first = first_step_statistics(tri_adapted("bert", init="sb"), several, 1.0)
    moved = tri_adapted("bert", init="xs")
    with torch.no_grad():
        for layer in tri_layers(moved):
            layer.tri_R["default"] += 5
    expected = logits(moved)
    second = first_step_statistics(moved, several, 1.0)
    assert all(torch.equal(first[module], second[module]) for module in first)
    assert torch.equal(logits(moved), expected)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("alpha", [3, 12])
def test_the_model_starts_as_the_best_version_of_its_first_step(name, alpha, tmp_path):
    several, _ = batches(name)
    model = tri_adapted(name, init="sb", lora_alpha=alpha)
    statistics = first_step_statistics(model, several, 0.01)
    apply_sb(model, statistics)
    for layer, statistic in zip(tri_layers(model), statistics.values(), strict=True):
        A, _, B = held_factors(layer)
        torch.testing.assert_close(A @ A.T, torch.eye(3).double(), atol=1e-6, rtol=0)
        torch.testing.assert_close(B.T @ B, torch.eye(3).double(), atol=1e-6, rtol=0)
        u, s, vt = torch.linalg.svd(statistic.double(), full_matrices=False)
        best = (u[:, :3] * s[:3]) @ vt[:3]
        torch.testing.assert_close(dense_product(layer), best, atol=1e-6, rtol=0)
    # The step lowers the loss that it was computed from.
    before = BUILD[name]()
    assert sum(loss(model) for loss in several) < sum(loss(before) for loss in several)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(BUILD[name](), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_nothing_is_applied_unless_everything_fits():
    model = tri_adapted("bert", init="xs")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    shapes = model.peft_config["default"].module_shapes
    whole = {module: torch.randn(shape) for module, shape in shapes.items()}
    last = list(whole)[-1]
    damaged = torch.randn(shapes[last])
    damaged[0, 0] = float("inf")
    for wrong, message in (
        ({**whole, "bert.pooler.dense": torch.zeros(24, 24)}, r"module bert.pooler.dense, which"),
        ({m: s for m, s in whole.items() if m != last}, rf"statistics lacks module {last}"),
        ({**whole, last: whole[last].T}, rf"of module {last} has shape \(24, 28\)"),
        ({**whole, last: damaged}, rf"of module {last} has shape .* finite"),
    ):
        with pytest.raises(FedcoreError, match=message):
            apply_sb(model, wrong)
    assert all(torch.equal(state[key], t) for key, t in model.state_dict().items())
    with pytest.raises(FedcoreError, match=r"no tri-factor adapter 'x'"):
        apply_sb(model, whole, "x")
    with pytest.raises(FedcoreError, match=r"no tri-factor adapter 'default'"):
        apply_sb(gpt2(), whole)


def test_bad_calls_for_statistics_are_named():
    model = tri_adapted("bert", init="sb")
    several, _ = batches("bert")
    for rate in (0.0, -1.0, float("nan")):
        with pytest.raises(FedcoreError, match="learning_rate is"):
            first_step_statistics(model, several, rate)
    with pytest.raises(FedcoreError, match="loss_batches is empty"):
        first_step_statistics(model, [], 1.0)
    head = [lambda m: m.base_model.model.classifier(torch.ones(1, 24)).sum()]
    with pytest.raises(FedcoreError, match=r"encoder.layer.0.* has no gradient"):
        first_step_statistics(model, head, 1.0)
    with pytest.raises(FedcoreError, match="is not finite"):
        first_step_statistics(model, [lambda m: several[0](m) * float("nan")], 1.0)
    merged = tri_adapted("bert", init="xs")
    merged.merge_adapter()
    with pytest.raises(FedcoreError, match="merged adapter; unmerge it first"):
        first_step_statistics(merged, several, 1.0)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "base_layer" in n)
