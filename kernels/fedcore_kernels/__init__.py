"""Linear algebra on batches of low-rank factors; needs torch alone.

Operations are plain functions on tensors or NumPy arrays that return tensors. ``backend`` and
``chosen_backend`` say which body runs.
"""

from fedcore_kernels.align_and_average import Alignment, align_and_average, rotate, rotations
from fedcore_kernels.block_grams import block_grams, mean_pair_gram, product_gram
from fedcore_kernels.cuda import register_bodies
from fedcore_kernels.dispatch import BACKENDS, backend, chosen_backend
from fedcore_kernels.errors import BackendError, KernelInputError
from fedcore_kernels.florg_round import FlorgRound, florg_round
from fedcore_kernels.layout import FactorLayout, FactorSlot, SlotGroup
from fedcore_kernels.nystrom import nystrom_step
from fedcore_kernels.polar import Polar, polar, procrustes
from fedcore_kernels.product_norm import product_norm
from fedcore_kernels.product_svd import (
    ProductSvd,
    Split,
    energy_rank,
    product_svd,
    tail_and_gap,
)
from fedcore_kernels.rows import joint_copies
from fedcore_kernels.soft_rotation import SoftRotation, soft_rotation
from fedcore_kernels.spectra import Eigh, Svd, column_signs, eigh_small, svd_small
from fedcore_kernels.stacks import apply_cores, cross_gram, gram
from fedcore_kernels.steps import EPS_REL, FactorStep, spread
from fedcore_kernels.truncated import truncated_step
from fedcore_kernels.weighted_mean import weighted_mean
from fedcore_kernels.whitened import (
    whitened_basis,
    whitened_step,
    whitened_sum,
    whitened_upload,
)

register_bodies()

__all__ = [
    "BACKENDS",
    "EPS_REL",
    "Alignment",
    "BackendError",
    "Eigh",
    "FactorLayout",
    "FactorSlot",
    "FactorStep",
    "FlorgRound",
    "KernelInputError",
    "Polar",
    "ProductSvd",
    "SlotGroup",
    "SoftRotation",
    "Split",
    "Svd",
    "align_and_average",
    "apply_cores",
    "backend",
    "block_grams",
    "chosen_backend",
    "column_signs",
    "cross_gram",
    "eigh_small",
    "energy_rank",
    "florg_round",
    "gram",
    "joint_copies",
    "mean_pair_gram",
    "nystrom_step",
    "polar",
    "procrustes",
    "product_gram",
    "product_norm",
    "product_svd",
    "rotate",
    "rotations",
    "soft_rotation",
    "spread",
    "svd_small",
    "tail_and_gap",
    "truncated_step",
    "weighted_mean",
    "whitened_basis",
    "whitened_step",
    "whitened_sum",
    "whitened_upload",
]
