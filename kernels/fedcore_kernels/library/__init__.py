"""The operations as ``torch.ops.fedcore.*``: for ``torch.compile``, autograd and CUDA graphs.

One file per family: what an operation checks when it runs, shape and dtype of its results, and its
gradient where it has one.
"""

from fedcore_kernels.library import (
    florg_steps,
    polar,
    product_norm,
    products,
    rotations,
    spectra,
    stacks,
    weighted_mean,
    whitened,
)

__all__ = [
    "florg_steps",
    "polar",
    "product_norm",
    "products",
    "rotations",
    "spectra",
    "stacks",
    "weighted_mean",
    "whitened",
]
