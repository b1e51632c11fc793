"""Whether the Hugging Face hub can give what a recipe names, asked before anything is prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from fedcore.errors import FedcoreError, missing_extra
from fedcore.training.sources import NamedSource

_SECONDS = 5.0


def check_obtainable(kind: Literal["model", "dataset"], found: NamedSource) -> None:
    """Refuse a hub id that is neither in this machine's cache nor within reach.

    Raises:
        FedcoreError: naming the id, the hub and what to pass instead.
        MissingExtraError: huggingface_hub is not installed.
    """
    if found.kind != "hub":
        return
    try:
        from huggingface_hub import constants
    except ImportError as error:
        raise missing_extra("huggingface_hub", "hub") from error
    folder = f"{kind}s--{found.location.replace('/', '--')}"
    if (Path(constants.HF_HUB_CACHE) / folder / "snapshots").is_dir():
        return
    if not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT):
        return
    key, wanted = ("model", "folder") if kind == "model" else ("data", "file")
    why = "is offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "cannot be reached"
    raise FedcoreError(
        f"{kind} {found.location!r} is not in this machine's cache and {constants.ENDPOINT} {why}; "
        f"pass a local {wanted} with --set {key}.source=PATH"
    )


def _answers(address: str) -> bool:
    try:
        with urlopen(Request(address, method="HEAD"), timeout=_SECONDS):
            return True
    except HTTPError:
        # A refusal is an answer.
        return True
    except OSError:
        return False
