"""The frozen isometries that carry a Gram factor to a layer's input and output space.

``W = W0 + s left A^T A right`` with ``left (out, k)``, ``right (k, in)``, ``k = min(out, in)``,
``left^T left = right right^T = I_k``. One random frame is enough (a square one can be absorbed into
the other), so the smaller side is the identity and the larger one is

    T = P F D    (k, w)    D random signs, F the orthonormal DCT-II, P a random choice of k rows.

Signs and rows are integers from ``shake_256`` of the recipe, equal on every machine, and only a
factor of a few rows is ever multiplied: O(w) state and O(w log w) work per row, no dense matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256, shake_256
from math import pi, sqrt
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedcore.data.seeding import derive_seed
from fedcore.errors import FedcoreError

FRAME_KINDS = ("structured", "qr")

_ID_DIGITS = 32


class Frame(Protocol):
    """What a layer and an export need of a frame: factors in, factors out."""

    def times_right(self, rows: Tensor) -> Tensor:
        """``rows (m, k)`` times ``right``, ``(m, in)``."""

    def times_left_t(self, rows: Tensor) -> Tensor:
        """``rows (m, k)`` times ``left^T``, ``(m, out)``."""


@dataclass(frozen=True)
class FrameRecipe:
    """All that a structured frame depends on."""

    kind: str
    seed: int
    module: str
    out_features: int
    in_features: int

    @property
    def k(self) -> int:
        """Width of the factor, ``min(out, in)``."""
        return min(self.out_features, self.in_features)

    @property
    def text(self) -> str:
        """The string that is hashed; changing its form changes every frame."""
        shape = f"{self.out_features}x{self.in_features}"
        return f"fedcore-frame/1/{self.kind}/{self.seed}/{self.module}/{shape}"

    @property
    def frame_id(self) -> str:
        """Hexadecimal identity; equal recipes, equal frames."""
        return sha256(self.text.encode()).hexdigest()[:_ID_DIGITS]

    def integers(self, purpose: str, size: int) -> bytes:
        """``size`` pseudo-random bytes for one ``purpose``, the same on every machine."""
        return shake_256(f"{self.text}/{purpose}".encode()).digest(size)


class StructuredFrame(nn.Module):
    """Identity on the smaller side; on the other random rows of a DCT with random signs.

    Orthonormal to about 4e-7 in fp32 and 1e-15 in fp64. Its state is not saved: it follows from the
    recipe. A cast of the model moves it to another device and never to another dtype.

    Example:
        >>> frame = StructuredFrame(FrameRecipe("structured", 0, "q", 5, 3))
        >>> left = frame.times_left_t(torch.eye(3, dtype=torch.float64)).T
        >>> torch.allclose(left.T @ left, torch.eye(3, dtype=torch.float64), atol=1e-15)
        True
    """

    rows: Tensor
    order: Tensor
    signs: Tensor
    twiddle: Tensor

    def __init__(self, recipe: FrameRecipe, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.recipe = recipe
        width = max(recipe.out_features, recipe.in_features)
        keys = np.frombuffer(recipe.integers("rows", 8 * width), dtype="<u8")
        rows = np.argsort(keys, kind="stable")[: recipe.k].astype(np.int64)
        bits = np.frombuffer(recipe.integers("signs", -(-width // 8)), dtype=np.uint8)
        signs = 1.0 - 2.0 * np.unpackbits(bits)[:width].astype(np.float32)
        # The DCT through a real FFT reads its samples in the order 0, 2, 4, ..., 5, 3, 1.
        order = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)[::-1]])
        for name, buffer in (
            ("rows", torch.from_numpy(rows)),
            ("order", torch.from_numpy(order)),
            ("signs", torch.from_numpy(signs)),
            ("twiddle", _twiddle(width, torch.float32)),
        ):
            self.register_buffer(name, buffer.to(device), persistent=False)

    @property
    def frame_id(self) -> str:
        """The recipe's identity."""
        return self.recipe.frame_id

    def times_right(self, rows: Tensor) -> Tensor:
        """``rows (m, k)`` times ``right``: ``(m, in)``, in fp32 or wider."""
        wide = self.recipe.in_features > self.recipe.out_features
        return self._spread(rows) if wide else rows

    def times_left_t(self, rows: Tensor) -> Tensor:
        """``rows (m, k)`` times ``left^T``: ``(m, out)``, in fp32 or wider."""
        wide = self.recipe.out_features >= self.recipe.in_features
        return self._spread(rows) if wide else rows

    def _spread(self, rows: Tensor) -> Tensor:
        spectrum = rows.new_zeros((*rows.shape[:-1], self.signs.numel()))
        spectrum = spectrum.index_copy(-1, self.rows, rows)
        return self._inverse_dct(spectrum) * self.signs.to(rows.dtype)

    def _inverse_dct(self, spectrum: Tensor) -> Tensor:
        n = spectrum.shape[-1]
        twiddle = self.twiddle
        if spectrum.dtype != torch.float32:
            twiddle = _twiddle(n, spectrum.dtype).to(spectrum.device)
        half = n // 2
        mirrored = nn.functional.pad(spectrum[..., n - half :].flip(-1), (1, 0))
        halved = torch.complex(spectrum[..., : half + 1], -mirrored) * twiddle
        samples = torch.fft.irfft(halved, n=n, norm="ortho")
        return torch.zeros_like(samples).index_copy(-1, self.order, samples)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StructuredFrame:
        # Only the device of a cast counts: a twiddle rounded to bf16 is orthonormal to 1e-2.
        device = fn(self.rows).device
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(device)
        return self


@dataclass(frozen=True)
class DenseFrame:
    """A frame held as matrices, ``left (out, k)`` and ``right (k, in)``; its bytes identify it."""

    left: Tensor
    right: Tensor

    @property
    def frame_id(self) -> str:
        """Hexadecimal digest of shapes, dtypes and bytes."""
        digest = sha256()
        for matrix in (self.left, self.right):
            digest.update(f"{tuple(matrix.shape)}{matrix.dtype}".encode())
            digest.update(matrix.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:_ID_DIGITS]

    def times_right(self, rows: Tensor) -> Tensor:
        """``rows (m, k)`` times ``right``: ``(m, in)``."""
        return rows @ self.right.to(rows.dtype)

    def times_left_t(self, rows: Tensor) -> Tensor:
        """``rows (m, k)`` times ``left^T``: ``(m, out)``."""
        return rows @ self.left.to(rows.dtype).T


def qr_frame(recipe: FrameRecipe) -> DenseFrame:
    """Draw a Gaussian-QR frame, fp32, orthonormal to about 1e-7.

    Two machines, or two thread counts, give frames that differ by rounding, so the one that was
    drawn is stored with the adapter and never drawn again.
    """
    generator = torch.Generator().manual_seed(derive_seed(recipe.seed, recipe.text))

    def isometry(width: int) -> Tensor:
        gaussian = torch.randn(width, recipe.k, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(gaussian).Q.float()

    left = isometry(recipe.out_features)
    return DenseFrame(left.contiguous(), isometry(recipe.in_features).T.contiguous())


def check_same_frames(expected: Mapping[str, str], found: Mapping[str, str], owner: str) -> None:
    """Raise unless ``found`` names the frames of ``expected`` for every module both know.

    Args:
        expected: module path to frame identity, for example ``config["frame_ids"]`` of the server.
        found: the same of the other side.
        owner: what to call the other side in the error, usually a client's id.

    Raises:
        FedcoreError: naming ``owner``, the first module and both identities.
    """
    for module in sorted(expected.keys() & found.keys()):
        if expected[module] != found[module]:
            raise FedcoreError(
                f"{owner}: module {module} has frame {found[module]}, not {expected[module]}; "
                "factors of different frames must not be mixed"
            )


def _twiddle(n: int, dtype: torch.dtype) -> Tensor:
    """``e^{i pi j / 2n}``, ``j = 0 .. n/2``, over sqrt(2) except at ``j = 0``; complex."""
    angle = torch.arange(n // 2 + 1, dtype=torch.float64) * (pi / (2 * n))
    size = torch.full_like(angle, sqrt(0.5))
    size[0] = 1.0
    return torch.polar(size, angle).to(torch.promote_types(dtype, torch.complex64))
