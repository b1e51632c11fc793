"""The adapters a run ends with, as folders that PEFT loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedcore.data.adapter_kind import not_additive
from fedcore.data.adapter_state import AdapterState
from fedcore.data.folders import replace_folder
from fedcore.data.peft_files import write_adapter, write_tensors
from fedcore.data.plain_lora import with_residual
from fedcore.experiments.client_models import client_row
from fedcore.experiments.setup import Experiment
from fedcore.federation.records import Sample
from fedcore.federation.state import ServerState
from fedcore.training.encoding import IGNORED
from fedcore.training.generation import continue_greedily
from fedcore.training.live_adapter import live_adapter
from fedcore.training.models import quiet_transformers

PROMPT = 16
"""Tokens that are given, or half of a text that has fewer than twice as many."""

CONTINUATION = 24
"""Tokens that are written."""


def generation_sample(experiment: Experiment, start: Tensor, state: ServerState) -> Sample:
    """The beginning of a held-out text, its own continuation, and the two models'.

    The text is the first held-out one of the most tokens; its beginning is what stands before the
    first token that is predicted, or :data:`PROMPT` tokens where all are. Where every client has a
    model of its own, the first client's is asked.

    Args:
        start: ``(P,)``, the row before any training.
    """
    tokens = experiment.examples.inputs(experiment.test)["attention_mask"].sum(dim=1)
    chosen = experiment.test[int(tokens.argmax())]
    length = int(tokens.max())
    text = experiment.examples.inputs(chosen[None])["input_ids"][0, :length]
    asked = (experiment.examples.targets(chosen[None])[0] != IGNORED).nonzero()
    given = int(asked[0]) + 1 if int(asked[0]) else min(PROMPT, length // 2)
    end = experiment.tokenizer.eos_token_id

    def continued(row: Tensor) -> str:
        experiment.binding.load(row)
        return _words(
            experiment, continue_greedily(experiment.model, text[:given], CONTINUATION, end)
        )

    experiment.residual.load({})
    before = continued(start)
    experiment.residual.load(state.residual)
    owner = experiment.trainers[0] if experiment.method.capabilities.personalised else None
    after = continued(state.row if owner is None else client_row(experiment, state, owner))
    return Sample(
        domain=experiment.label_names[int(experiment.examples.labels[chosen])],
        client=owner,
        prompt=_words(experiment, text[:given]),
        reference=_words(experiment, text[given : given + CONTINUATION]),
        before=before,
        after=after,
    )


def _words(experiment: Experiment, tokens: Tensor) -> str:
    text: str = experiment.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    return text


def write_adapters(experiment: Experiment, state: ServerState, folder: Path) -> list[Path]:
    """Write the final adapter below ``folder`` and return the folders written.

    ``adapter/`` is the global adapter, together with the residual of the base weights where the
    method has one; ``adapters/CLIENT/`` where every client has a model of its own. An adapter that
    is not LoRA of scale ``alpha / r`` is also written as one, ``adapter-lora/``, which every server
    loads and PEFT without fedcore.
    A run without adapter leaves its head in ``head/``, or where the whole model trained, the model
    and its tokenizer in ``model/``, which transformers loads.
    """
    if experiment.method.capabilities.whole_model:
        return [_write_model(experiment, state.row, folder / "model")]
    if experiment.method.family == "none":
        head = folder / "head"
        tensors = {s.name: state.layout.view(state.row, s).clone() for s in state.layout}
        write_tensors(tensors, head / "model.safetensors")
        return [head]
    if experiment.method.capabilities.personalised:
        return [
            path
            for client in sorted(state.simulated_clients)
            for path in _write(
                experiment, client_row(experiment, state, client), folder / "adapters", client
            )
        ]
    if state.residual:
        adapter = with_residual(
            adapter_state(experiment.model, state.row, experiment), state.residual
        )
        return [write_adapter(adapter, folder / "adapter")]
    return _write(experiment, state.row, folder, "adapter")


def _write_model(experiment: Experiment, row: Tensor, folder: Path) -> Path:
    experiment.binding.load(row)
    with replace_folder(folder) as new, quiet_transformers():
        model: Any = experiment.model
        model.save_pretrained(new)
        experiment.tokenizer.save_pretrained(new)
    return folder


def _write(experiment: Experiment, row: Tensor, folder: Path, name: str) -> list[Path]:
    state = adapter_state(experiment.model, row, experiment)
    written = [write_adapter(state, folder / name)]
    if experiment.method.family != "lora" or _scaled_otherwise(state):
        from fedcore.tuners import export_lora

        export_lora(written[0], folder / f"{name}-lora")
        written.append(folder / f"{name}-lora")
    return written


def _scaled_otherwise(state: AdapterState) -> bool:
    """Whether readers that divide ``lora_alpha`` by the rank would scale this LoRA wrongly."""
    return bool(state.config.get("use_rslora")) and not_additive(state.config, state.dense) is None


def adapter_state(model: nn.Module, row: Tensor, experiment: Experiment) -> AdapterState:
    """The model's adapter with the values of ``row``."""
    experiment.binding.load(row)
    return live_adapter(model, "the final adapter")
