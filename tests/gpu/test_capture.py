"""The mean and the sketched step can be captured in a CUDA graph: they read no value.

On a card they are captured and replayed. In the interpreter every way of reading a tensor's values
on the host, and of bringing values from the host, fails while they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedcore_kernels import (
    FactorLayout,
    apply_cores,
    backend,
    cross_gram,
    florg_round,
    gram,
    nystrom_step,
    weighted_mean,
)
from tests.property.stacks import make_round

LAYOUT = FactorLayout.build(
    [("a", "A", 2, 40), ("b", "A", 2, 33), ("a", "B", 1, 50)], [("c", (9,))]
)

READS = ("item", "tolist", "nonzero", "cpu", "numpy")
CONVERSIONS = ("__bool__", "__int__", "__float__", "__index__")

# Operators that wait for the device, or copy from host memory that is not pinned.
SYNCHRONISING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "lift_fresh",
    "_linalg_eigh",
    "_linalg_svd",
    "linalg_qr",
    "repeat_interleave.Tensor",
)


class NoReads(TorchDispatchMode):
    """Fails on operators that read values, boolean indices among them."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        name = operator.name().removeprefix("aten::")
        assert name not in SYNCHRONISING, name
        assert name.partition(".")[0] not in SYNCHRONISING, name
        if name in ("index.Tensor", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in arguments[1])
        return operator(*arguments, **(options or {}))


def _read(*_: Any) -> NoReturn:
    raise AssertionError("a value was read")


@contextmanager
def as_if_captured() -> Iterator[None]:
    """Tensors say that they are on a card that records, and no value can be read."""
    with pytest.MonkeyPatch.context() as patch, NoReads():
        patch.setattr(Tensor, "is_cuda", True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for name in READS + CONVERSIONS:
            patch.setattr(Tensor, name, _read)
        yield


def calls() -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    case = make_round("random", 3, 2, 2, 300, seed=1, dtype=torch.float32)
    row = torch.randn(LAYOUT.size)
    rows = row + 0.1 * torch.randn(3, LAYOUT.size)
    return {
        "weighted_mean": (weighted_mean, (case.stack.flatten(1), case.weights)),
        "gram": (gram, (case.stack, case.weights)),
        "cross_gram": (cross_gram, (case.stack, case.previous)),
        "apply_cores": (apply_cores, (torch.randn(2, 2, 3, 2), case.stack)),
        "nystrom_step": (
            lambda *given: nystrom_step(*given, on_rank_loss="keep_prev").factor,
            (case.stack, case.weights, case.previous),
        ),
        "florg_round": (
            lambda *given: florg_round(*given, LAYOUT, "sketched").row,
            (rows, case.weights, row),
        ),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_captured_and_replayed(name: str, device: torch.device) -> None:
    function, given = calls()[name]
    given = tuple(value.to(device) for value in given)
    with backend("triton"):
        # Kernels are compiled and task tables built by the first call.
        expected = function(*given)
        if device.type != "cuda":
            with as_if_captured():
                found = function(*given)
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = function(*given)
            found.zero_()
            graph.replay()
    assert torch.equal(found, expected)


def test_the_spies_see_a_read() -> None:
    """A boolean index, a Python number and a table from the host are all noticed."""
    value = torch.arange(4.0)
    reads: tuple[Callable[[], Any], ...] = (
        lambda: value[value > 1],
        lambda: value.sum().item(),
        lambda: bool(value.any()),
        lambda: torch.tensor([1.0, 2.0]) + value[:2],
        lambda: torch.linalg.svd(value.reshape(2, 2)),
        lambda: value.repeat_interleave(torch.tensor([1, 1, 2, 0])),
    )
    for read in reads:
        with pytest.raises(AssertionError), as_if_captured():
            read()
