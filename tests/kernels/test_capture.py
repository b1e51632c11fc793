"""While a CUDA graph is captured no value may be read.

There is no card here: ``OnCard`` is a tensor on the CPU that says it is on a CUDA device and fails
when a value of it is asked for.
"""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from fedcore_kernels import (
    BackendError,
    KernelInputError,
    chosen_backend,
    cross_gram,
    gram,
    nystrom_step,
    weighted_mean,
)
from fedcore_kernels import dispatch as table
from fedcore_kernels.client_weights import normalised, shares
from tests.property.stacks import make_round

CASE = make_round("zero_weight", 4, 2, 2, 9, 0)


class OnCard(Tensor):
    is_cuda = True

    def _read(self, *_: Any) -> NoReturn:
        raise AssertionError("a value was read")

    __bool__ = __int__ = __float__ = __index__ = item = tolist = nonzero = numpy = cpu = _read  # type: ignore[assignment]


def on_card(value: Tensor) -> OnCard:
    return value.as_subclass(OnCard)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def plain(value: Tensor) -> Tensor:
    return value.as_subclass(Tensor)


@pytest.mark.usefixtures("capture")
def test_weights_on_the_device_are_normalised_there() -> None:
    found = shares(on_card(CASE.weights.float()), on_card(CASE.stack))
    assert isinstance(found, OnCard)
    assert found.dtype == torch.float64
    assert torch.equal(plain(found), shares(CASE.weights.float(), CASE.stack))


def test_they_are_the_shares_of_checked_weights() -> None:
    for weights in ([1, 3], [1e308, 1e308], [0, 2**30, 5]):
        given = torch.tensor(weights, dtype=torch.float64)
        assert torch.equal(normalised(given), shares(given, CASE.stack))
        assert normalised(given).sum() == 1


@pytest.mark.usefixtures("capture")
@pytest.mark.parametrize("weights", [[1.0] * 4, torch.ones(4)])
def test_weights_on_the_cpu_are_refused(weights: Any) -> None:
    with pytest.raises(KernelInputError, match="weights is on cpu while a CUDA graph is captured"):
        gram(on_card(CASE.stack), weights)


@pytest.mark.usefixtures("capture")
def test_operations_that_read_nothing_are_captured() -> None:
    found = gram(on_card(CASE.stack), on_card(CASE.weights))
    assert torch.equal(plain(found), gram(CASE.stack, CASE.weights))
    found = cross_gram(on_card(CASE.stack), on_card(CASE.previous))
    assert torch.equal(plain(found), cross_gram(CASE.stack, CASE.previous))


@pytest.mark.usefixtures("capture")
def test_bodies_receive_what_lies_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton body of the mean gets its shares there; a zero previous factor is not looked for."""
    monkeypatch.setattr(table, "_bodies", {op: {**found} for op, found in table._bodies.items()})
    received: dict[str, tuple[Any, ...]] = {}

    def spy(name: str, *arguments: Any) -> tuple[Any, ...]:
        received[name] = arguments
        return arguments[:1] * 6

    for name in ("weighted_mean", "nystrom_step"):
        table.register(name, "triton", lambda *a, name=name: spy(name, *a))
    weighted_mean(on_card(CASE.stack.flatten(1)), on_card(CASE.weights))
    nystrom_step(on_card(CASE.stack), on_card(CASE.weights), on_card(0 * CASE.previous))
    for name, power in (("weighted_mean", 1), ("nystrom_step", 2)):
        given = received[name][1]
        assert isinstance(given, OnCard)
        assert torch.allclose(plain(given) ** power, CASE.shares)


@pytest.mark.usefixtures("capture")
def test_bodies_that_read_values_say_that_they_cannot_be_captured() -> None:
    with pytest.raises(BackendError, match="torch: it reads values, which a CUDA graph capture"):
        weighted_mean(on_card(CASE.stack.flatten(1)), on_card(CASE.weights))
    for op in ("eigh_small", "svd_small", "polar", "procrustes", "nystrom_step", "truncated_step"):
        with pytest.raises(BackendError, match="reads values"):
            chosen_backend(op, on_card(CASE.stack))
        assert chosen_backend(op, CASE.stack) == "torch"


def test_on_the_cpu_nobody_asks_for_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> bool:
        raise AssertionError("asked for a capture")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked)
    nystrom_step(CASE.stack, CASE.weights, CASE.previous)
    weighted_mean(CASE.stack.flatten(1), CASE.weights)


def test_without_a_capture_values_on_the_device_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(AssertionError, match="a value was read"):
        gram(on_card(CASE.stack), on_card(CASE.weights))
