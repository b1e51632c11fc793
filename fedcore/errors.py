"""The errors a user of fedcore meets, and how they are worded."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class FedcoreError(ValueError):
    """Something given to fedcore is wrong; the message names it, its value and what to pass."""


class MissingExtraError(ImportError):
    """An optional dependency is needed and not installed; the message names the extra."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> FedcoreError:
    """A one-line error for a ``name`` that is not among ``known``, with the nearest valid names."""
    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"valid: {', '.join(names)}"
    return FedcoreError(f"unknown {kind} {name!r}; {hint}")


def missing_extra(package: str, extra: str) -> MissingExtraError:
    """An error that says which extra of the distribution brings ``package``."""
    return MissingExtraError(
        f"{package} is not installed; install it with: pip install 'fedcore-lora[{extra}]'"
    )
