"""Takes back what a Trainer does to a model and to its process.

transformers, trl and accelerate exchange a model's ``forward``, add hooks and attributes, change
modes and configuration, reseed the global generators, and set process-wide state. A client's model
lives on, so all of that is put back: what a module and a configuration held before, they hold
again, whatever it was that changed it.
"""

from __future__ import annotations

import gc
import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

# A module's own tensors and children are what training is about.
_KEPT = ("_parameters", "_buffers", "_modules")

_LOGGERS = ("transformers", "trl", "accelerate", "datasets", "peft", "huggingface_hub")


@contextmanager
def model_as_before(model: nn.Module) -> Iterator[None]:
    """On leaving, ``model`` is as it was, but for the values of its parameters and buffers.

    Attributes of every module (``forward``, hooks, checkpointing, modes, tags), configurations,
    gradients and which parameters require one.
    """
    holders: list[Any] = [*model.modules(), *_configurations(model)]
    attributes = [(holder, dict(vars(holder))) for holder in holders]
    # Changed in place: handles of older hooks find theirs by the dictionary it is in.
    containers = [
        (value, value.copy())
        for _, values in attributes
        for name, value in values.items()
        if isinstance(value, dict | list) and name not in _KEPT
    ]
    tensors = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        yield
    finally:
        for container, before in containers:
            container.clear()
            if isinstance(container, dict):
                container.update(before)
            else:
                container.extend(before)
        for holder, values in attributes:
            vars(holder).clear()
            vars(holder).update(values)
        for parameter, flag, grad in tensors:
            parameter.requires_grad_(flag)
            parameter.grad = grad


@contextmanager
def process_as_before(device: torch.device) -> Iterator[None]:
    """No log line or progress bar, and on leaving the generators and states of before.

    Python's, NumPy's and torch's generators, the last one's on ``device`` too; verbosity of the
    libraries; accelerate's shared state; the precision of matrix products.

    Collecting garbage takes a second over all that transformers imports, and accelerate does it
    twice in a training. What exists already is frozen meanwhile, unless the process froze some
    before, which no call could tell apart from it.
    """
    import datasets
    from accelerate.state import AcceleratorState, GradientState, PartialState

    shared = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    states = [(state, dict(state)) for state in shared]
    levels = [(logger, logger.level) for logger in map(logging.getLogger, _LOGGERS)]
    # NumPy's global generator, which transformers reseeds.
    generators = random.getstate(), np.random.get_state()  # noqa: NPY002
    backends: Any = torch.backends
    precision = getattr(backends, "fp32_precision", None)
    bars = not datasets.are_progress_bars_disabled()
    freezes = not gc.get_freeze_count()
    devices = [device] if device.type == "cuda" else []
    try:
        datasets.disable_progress_bars()
        for logger, _ in levels:
            logger.setLevel(logging.ERROR)
        if freezes:
            gc.freeze()
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if freezes:
            gc.unfreeze()
        for logger, level in levels:
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
        random.setstate(generators[0])
        np.random.set_state(generators[1])  # noqa: NPY002
        if getattr(backends, "fp32_precision", None) != precision:
            backends.fp32_precision = precision
        for state, before in states:
            state.clear()
            state.update(before)


def _configurations(model: nn.Module) -> list[Any]:
    """The configurations in ``model`` that a Trainer writes to, each once."""
    configurations: dict[int, Any] = {}
    for module in model.modules():
        for name in ("config", "generation_config"):
            value = vars(module).get(name)
            parts = [value, getattr(value, "__dict__", {}).get("text_config")]
            configurations.update({id(part): part for part in parts if hasattr(part, "__dict__")})
    return list(configurations.values())
