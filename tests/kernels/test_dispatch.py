from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fedcore_kernels import BackendError, backend, chosen_backend, weighted_mean
from fedcore_kernels import dispatch as table

OPS = (
    "apply_cores",
    "cross_gram",
    "eigh_small",
    "florg_round",
    "gram",
    "mean_pair_gram",
    "nystrom_step",
    "polar",
    "procrustes",
    "product_gram",
    "product_norm",
    "product_svd",
    "soft_rotation",
    "svd_small",
    "truncated_step",
    "weighted_mean",
    "whitened_basis",
    "whitened_step",
    "whitened_sum",
    "whitened_upload",
)


def test_every_operation_has_a_torch_body_and_a_definition() -> None:
    assert sorted(table._bodies) == list(OPS)
    for op in OPS:
        for name in ("torch", "reference"):
            with backend(name):
                assert chosen_backend(op, torch.ones(2, 2)) == name


def test_auto_never_takes_the_definition() -> None:
    for op in OPS:
        assert chosen_backend(op, torch.ones(2, 2)) == "torch"


def test_the_named_body_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = {**table._bodies["weighted_mean"]}
    monkeypatch.setitem(table._bodies, "weighted_mean", bodies)
    calls = []
    for name in ("torch", "triton"):
        table.register("weighted_mean", name, lambda *_, name=name: calls.append(name))
    weighted_mean([[1.0]], [1])
    with backend("torch"):
        weighted_mean([[1.0]], [1])
        with backend("auto"):
            weighted_mean([[1.0]], [1])
    assert calls == ["triton", "torch", "triton"]


def test_a_named_backend_runs_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with backend("triton"), pytest.raises(BackendError, match="product_norm has no triton body"):
        chosen_backend("product_norm", torch.ones(1))
    bodies = {**table._bodies["weighted_mean"]}
    monkeypatch.setitem(table._bodies, "weighted_mean", bodies)
    table.register("weighted_mean", "triton", print, table.needs_cuda)
    assert chosen_backend("weighted_mean", torch.ones(1)) == "torch"
    with backend("triton"), pytest.raises(BackendError, match="on cpu, not on a CUDA device"):
        weighted_mean([[1.0]], [1])


def test_names_are_checked_and_the_choice_ends_with_its_block() -> None:
    with pytest.raises(BackendError, match="unknown backend 'cuda'; valid: auto, triton, torch"):
        backend("cuda").__enter__()
    with pytest.raises(BackendError, match="unknown operation 'mean'; valid: apply_cores"):
        chosen_backend("mean")
    with pytest.raises(BackendError, match="unknown backend 'cuda'"):
        table.register("weighted_mean", "cuda", print)
    with pytest.raises(ZeroDivisionError), backend("reference"):
        raise ZeroDivisionError
    assert chosen_backend("gram", torch.ones(1)) == "torch"


def test_the_choice_belongs_to_one_thread() -> None:
    with backend("reference"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(chosen_backend, "gram", torch.ones(1)).result() == "torch"
        assert chosen_backend("gram", torch.ones(1)) == "reference"
