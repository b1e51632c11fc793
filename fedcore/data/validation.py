"""What is wrong with an upload, said by client, module and value, before anything is aggregated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import inf, isfinite
from typing import Literal

import torch
from torch import Tensor

from fedcore.checks import is_number
from fedcore.data.adapter_state import AdapterState
from fedcore.data.peft_keys import CORE
from fedcore.data.rows import rank_and_width
from fedcore.errors import FedcoreError, printable
from fedcore_kernels.layout import FactorLayout

OnInvalid = Literal["raise", "drop"]

Weighting = Literal["examples", "uniform"]
"""By the examples that clients report, or all alike: then what a client reports is not read."""


@dataclass(frozen=True, order=True)
class Dropped:
    """A client whose upload was left out of a round, and why."""

    client_id: str
    reason: str


MOST_WEIGHT = 2.0**53
"""A number of examples is at most this: beyond it fp64 does not hold every integer, and any number
of such weights has a finite sum."""


def check_weight(weight: float) -> str | None:
    """The problem with a client's weight, if any (zero is legal: the client has no influence)."""
    if not 0 <= weight < inf:
        return f"its weight is {weight}; weights are finite and not negative"
    if weight > MOST_WEIGHT:
        return "its weight is too large: more than 2**53, beyond any number of examples"
    return None


def one_number(name: str, value: object) -> float:
    """A number that a client reports under ``name``, as fp64.

    Raises:
        FedcoreError: it is another value, or not finite; the value is not in the message.
    """
    if not is_number(value):
        raise FedcoreError(
            f"its {printable(name)} is of type {type(value).__name__}; send a number"
        )
    try:
        number = float(value)
    except OverflowError:
        number = inf
    if not isfinite(number):
        raise FedcoreError(f"its {printable(name)} is not a finite number")
    return number


def check_row(row: Tensor, layout: FactorLayout) -> str | None:
    """The first tensor of ``row`` with a value that is not finite, if any."""
    # One pass over the row; only a bad row is searched for the culprit.
    if bool(torch.isfinite(row.sum())) or bool(torch.isfinite(row).all()):
        return None
    for slot in layout:
        values = layout.view(row, slot)
        bad = ~torch.isfinite(values)
        if bad.any():
            value = values[bad][0].item()
            return f"{slot.name} holds {int(bad.sum())} values that are not finite, such as {value}"
    return None


def check_state(state: AdapterState, layout: FactorLayout, *, mixed_ranks: bool) -> str | None:
    """The first way in which ``state`` does not fit ``layout``, if any.

    Shapes are compared, never broadcast. A lower rank than the layout's is accepted only with
    ``mixed_ranks``; a higher one never.
    """
    slots = state.layout().by_name
    missing = [slot.name for slot in layout if slot.name not in slots]
    if missing:
        return f"{missing[0]} is missing"
    extra = [name for name in slots if name not in layout.by_name]
    if extra:
        return f"unexpected tensor {extra[0]}"
    for slot in layout:
        mine = slots[slot.name]
        if slot.dense and mine.shape != slot.shape:
            return f"{slot.name} has shape {mine.shape}, expected {slot.shape}"
        # A core is as wide as its own rank, which the next check compares.
        if mine.width != slot.width and slot.factor != CORE:
            return f"{slot.name} has width {mine.width}, expected {slot.width}"
        if mine.rows > slot.rows or (mine.rows < slot.rows and not mixed_ranks):
            return f"{slot.name} has rank {mine.rows}, expected {slot.rows}"
    return None


def check_rounds(adapter: AdapterState, what: str) -> None:
    """Refuse an adapter whose tensors stand in a live model in another form than in a row.

    Args:
        what: the argument that holds the adapter; it begins the message.

    Raises:
        FedcoreError: naming the first such module.
    """
    for name in adapter.forms:
        raise FedcoreError(
            f"{what}: {name} is of a convolution or of experts (target_parameters), whose adapters "
            "can be merged (fedcore aggregate) and not trained in rounds; adapt linear layers"
        )


def rank_problem(state: AdapterState) -> str | None:
    """The first module of a rank that its product cannot have, if any.

    Rows of all adapters are as wide as the widest: one such adapter makes every other one grow.
    """
    for module, named in state.factors.items():
        sides = [
            rank_and_width(factor, tensor)[1] for factor, tensor in named.items() if factor != CORE
        ]
        if state.rank(module) > min(sides):
            return (
                f"module {module} has rank {state.rank(module)}, its update has at most "
                f"{min(sides)}; train it with a rank that is no larger"
            )
    return None


def refuse_ranks(state: AdapterState, what: str) -> None:
    """Refuse an adapter of a rank that its update cannot have.

    Args:
        what: the argument that holds the adapter; it begins the message.

    Raises:
        FedcoreError: naming the module and its largest rank.
    """
    if problem := rank_problem(state):
        raise FedcoreError(f"{what}: {problem}")


def digest(row: Tensor, layout: FactorLayout, constants: Iterable[Tensor] = ()) -> str:
    """A hash of the bytes of ``row``'s tensors and of ``constants``, to compare frozen parts."""
    total = sha256()
    pieces = [layout.view(row, slot) for slot in layout]
    for piece in [*pieces, *constants]:
        flat = piece.detach().cpu().contiguous().reshape(-1)
        total.update(f"{flat.dtype} {tuple(piece.shape)}".encode())
        total.update(flat.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def identical_rows(updates: Tensor) -> bool:
    """Whether all of several uploads are the same bits.

    It is the symptom of a sum-only aggregator that overwrites every upload with the mean, or of
    clients that did not train; methods that are not linear would silently lose their correction.
    """
    return updates.shape[0] > 1 and bool((updates == updates[0]).all())


def enforce(problems: Sequence[Dropped], on_invalid: OnInvalid, round_: int) -> None:
    """Raise on the first problem unless invalid uploads are to be dropped.

    Raises:
        FedcoreError: naming the client, what is wrong and how many other uploads are bad.
    """
    if on_invalid not in ("raise", "drop"):
        raise FedcoreError(f"on_invalid is {on_invalid!r}; pass 'raise' or 'drop'")
    if problems and on_invalid == "raise":
        first, others = problems[0], len(problems) - 1
        more = f" (and {others} more)" if others else ""
        raise FedcoreError(f"round {round_}: client {first.client_id}: {first.reason}{more}")
