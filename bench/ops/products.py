"""``product_svd``: the best low-rank adapter of a mean of products, without the products."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.baselines.dense_svd import dense_svd
from bench.baselines.peft_weighted_adapter import peft_model, peft_weighted_adapter
from bench.case import Case, Plan, one_operation
from bench.workloads import Setting
from fedcore_kernels import product_svd

CLIENTS, RANK, WIDTH, SMALL_WIDTH = 10, 16, 2048, 256

DENSE, PEFT = "dense mean + torch.linalg.svd", "PEFT add_weighted_adapter svd"


def plans(setting: Setting) -> list[Plan]:
    """One module as wide as a billion-parameter model's."""
    width = SMALL_WIDTH if setting.small else WIDTH
    return [Plan("product_svd", partial(_case, width, setting.device))]


def client_factors(
    clients: int, modules: int, rank: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """``left`` and ``right`` (N, L, r, k), small drifts of one start, and weights (N,)."""
    random = torch.Generator(device).manual_seed(0)
    shape = (2, clients, modules, rank, width)
    start = torch.randn(2, 1, *shape[2:], generator=random, device=device)
    drift = torch.randn(shape, generator=random, device=device)
    left, right = 0.02 * start + 0.002 * drift
    return left, right, torch.linspace(0.5, 1.5, clients)


def product_flops(clients: int, modules: int, rank: int, width: int) -> float:
    """Nominal flops of ``product_svd``: two QR factors, a small core, two results."""
    rows = clients * rank
    return float(modules * ((4 * rows**2 + 4 * rank * rows) * width + 24 * rows**3))


def _case(width: int, device: torch.device) -> Case:
    left, right, weights = client_factors(CLIENTS, 1, RANK, width, device)
    shares = (weights / weights.sum()).to(device)
    model, counts = peft_model(left[:, 0], right[:, 0]), weights.tolist()
    return one_operation(
        "product_svd",
        f"N={CLIENTS} L=1 r={RANK} {width} x {width}",
        left,
        lambda: product_svd(left, right, weights, RANK),
        {
            DENSE: lambda: dense_svd(left, right, shares, RANK),
            PEFT: lambda: peft_weighted_adapter(model, counts, RANK),
        },
        read=left.nbytes + right.nbytes,
        written=2 * 4 * RANK * width,
        flops=product_flops(CLIENTS, 1, RANK, width),
    )
