"""Which body of an operation runs: the one place where that is decided.

Every operation has one meaning and up to three bodies: ``triton`` (CUDA), ``torch`` (any device)
and ``reference`` (an fp64 definition that a test suite registers). ``auto``, the default, takes
the first of ``triton`` and ``torch`` that can run on the tensors given; a backend requested by
name runs or raises. The request is a context variable, so it belongs to one thread or task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedcore_kernels.errors import BackendError

BACKENDS = ("triton", "torch", "reference")
"""The names by which a backend may be requested, besides ``"auto"``."""

_AUTOMATIC = ("triton", "torch")

Obstacle = Callable[..., str | None]
"""Given an operation's tensors, why a body cannot run on them, or ``None``."""


@dataclass(frozen=True)
class _Body:
    function: Callable[..., Any]
    obstacle: Obstacle


_bodies: dict[str, dict[str, _Body]] = {}
_requested: ContextVar[str] = ContextVar("fedcore_kernels_backend", default="auto")


def _runs_anywhere(*_: Tensor) -> str | None:
    return None


def needs_cuda(*tensors: Tensor) -> str | None:
    """The obstacle of a Triton body: a tensor that is not on a CUDA device."""
    other = next((t.device for t in tensors if t.device.type != "cuda"), None)
    return None if other is None else f"a tensor is on {other}, not on a CUDA device"


def register(
    op: str, name: str, function: Callable[..., Any], obstacle: Obstacle = _runs_anywhere
) -> None:
    """Make ``function`` the body ``name`` of ``op``; a body registered earlier is replaced.

    Raises:
        BackendError: ``name`` is not one of :data:`BACKENDS`.
    """
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; valid: {', '.join(BACKENDS)}")
    _bodies.setdefault(op, {})[name] = _Body(function, obstacle)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the operations called inside the block on the backend ``name``.

    The choice holds for the current thread or task alone. Blocks nest; ``"auto"`` gives the choice
    back to the dispatcher.

    Raises:
        BackendError: ``name`` is unknown; an operation inside the block raises it when the backend
            has no body for it or cannot run on its tensors.

    Example:
        >>> import torch
        >>> from fedcore_kernels import backend, weighted_mean
        >>> with backend("torch"):
        ...     weighted_mean(torch.tensor([[1.0], [4.0]]), [2, 1])
        tensor([2.])
    """
    if name != "auto" and name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; valid: auto, {', '.join(BACKENDS)}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def chosen_backend(op: str, *tensors: Tensor) -> str:
    """The name of the backend that ``op`` would run on for ``tensors``, in this context.

    Raises:
        BackendError: the operation is unknown, or the requested backend cannot run; the message
            says why.

    Example:
        >>> import torch
        >>> chosen_backend("gram", torch.zeros(2, 1, 2, 8))
        'torch'
    """
    if op not in _bodies:
        raise BackendError(f"unknown operation {op!r}; valid: {', '.join(sorted(_bodies))}")
    bodies, asked = _bodies[op], _requested.get()
    reasons = []
    for name in _AUTOMATIC if asked == "auto" else (asked,):
        if name not in bodies:
            reasons.append(f"{op} has no {name} body")
            continue
        why = bodies[name].obstacle(*tensors)
        if why is None:
            return name
        reasons.append(f"{name}: {why}")
    raise BackendError(f"{op} cannot run on backend {asked!r}: {'; '.join(reasons)}")


def run(op: str, tensors: tuple[Tensor, ...], *options: Any) -> Any:
    """Call the chosen body of ``op`` with ``tensors`` and ``options``, recording no gradient."""
    body = _bodies[op][chosen_backend(op, *tensors)].function
    with torch.no_grad():
        return body(*tensors, *options)
