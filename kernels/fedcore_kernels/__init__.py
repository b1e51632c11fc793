"""Linear algebra on batches of low-rank factors; needs torch alone.

Operations are plain functions on tensors or NumPy arrays that return tensors. ``backend`` and
``chosen_backend`` say which body runs.
"""

from fedcore_kernels.dispatch import BACKENDS, backend, chosen_backend
from fedcore_kernels.errors import BackendError, KernelInputError
from fedcore_kernels.florg_round import FlorgRound, florg_round
from fedcore_kernels.layout import FactorLayout, FactorSlot, SlotGroup
from fedcore_kernels.nystrom import nystrom_step
from fedcore_kernels.polar import Polar, polar, procrustes
from fedcore_kernels.product_norm import product_norm
from fedcore_kernels.spectra import Eigh, Svd, eigh_small, svd_small
from fedcore_kernels.stacks import apply_cores, cross_gram, gram
from fedcore_kernels.steps import FactorStep
from fedcore_kernels.truncated import truncated_step
from fedcore_kernels.weighted_mean import weighted_mean
from fedcore_kernels.whitened import whitened_basis, whitened_step, whitened_upload

__all__ = [
    "BACKENDS",
    "BackendError",
    "Eigh",
    "FactorLayout",
    "FactorSlot",
    "FactorStep",
    "FlorgRound",
    "KernelInputError",
    "Polar",
    "SlotGroup",
    "Svd",
    "apply_cores",
    "backend",
    "chosen_backend",
    "cross_gram",
    "eigh_small",
    "florg_round",
    "gram",
    "nystrom_step",
    "polar",
    "procrustes",
    "product_norm",
    "svd_small",
    "truncated_step",
    "weighted_mean",
    "whitened_basis",
    "whitened_step",
    "whitened_upload",
]
