"""Make Triton's interpreter honest about ``tl.dot``.

Triton's interpreter multiplies the bit patterns of bf16 operands as integers and computes TF32 in
full single precision. Here bf16 is widened first, and operands of a TF32 product are rounded to the
ten bits of mantissa that the hardware keeps, so that a kernel that asks for too little precision
fails in the interpreter as it would on a card.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

_DROPPED_BITS = 13


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """fp32 ``values`` rounded to nearest, ties to even, with ten bits of mantissa."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = (bits >> _DROPPED_BITS) & 1
    half = (1 << (_DROPPED_BITS - 1)) - 1
    mask = np.uint32(0xFFFFFFFF << _DROPPED_BITS & 0xFFFFFFFF)
    return ((bits + half + odd) & mask).view(np.float32)


def _operand(handle: Any, precision: Any) -> Any:
    if handle.dtype == tl.bfloat16:
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)
    if handle.dtype == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
        return interpreter.TensorHandle(round_to_tf32(handle.data), tl.float32)
    return handle


def install() -> None:
    """Correct ``tl.dot`` for this process; a second call changes nothing."""
    builder = interpreter.InterpreterBuilder
    plain = builder.create_dot
    if getattr(plain, "corrected", False):
        return

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        return plain(self, _operand(a, precision), _operand(b, precision), d, precision, imprecise)

    create_dot.corrected = True  # type: ignore[attr-defined]
    builder.create_dot = create_dot
