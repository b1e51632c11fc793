"""The adapters a run ends with, as folders that PEFT loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedcore.data.adapter_state import AdapterState
from fedcore.data.peft_files import write_adapter, write_tensors
from fedcore.data.plain_lora import with_residual
from fedcore.experiments.client_models import client_row
from fedcore.experiments.setup import Workbench
from fedcore.federation.state import ServerState
from fedcore.training.generation import continue_greedily
from fedcore.training.live_adapter import live_adapter

PROMPT = 16
"""Tokens that are given, or half of a text that has fewer than twice as many."""

CONTINUATION = 24
"""Tokens that are written."""


def generation_sample(bench: Workbench, start: Tensor, state: ServerState) -> dict[str, Any]:
    """The beginning of a held-out text, its own continuation, and the two models'.

    The text is the first held-out one of the most tokens. Where every client has a model of its
    own, the first client's is asked.

    Args:
        start: ``(P,)``, the row before any training.
    """
    tokens = bench.examples.attention_mask[bench.test].sum(dim=1)
    chosen = int(bench.test[int(tokens.argmax())])
    length = int(tokens.max())
    text = bench.examples.input_ids[chosen, :length]
    given = min(PROMPT, length // 2)
    end = bench.tokenizer.eos_token_id

    def continued(row: Tensor) -> str:
        bench.binding.load(row)
        return _words(bench, continue_greedily(bench.model, text[:given], CONTINUATION, end))

    bench.residual.load({})
    before = continued(start)
    bench.residual.load(state.residual)
    own = bench.trainers[0] if bench.method.traits.personalised else None
    after = continued(state.row if own is None else client_row(bench, state, own))
    return {
        "domain": bench.label_names[int(bench.examples.labels[chosen])],
        "client": own,
        "prompt": _words(bench, text[:given]),
        "reference": _words(bench, text[given : given + CONTINUATION]),
        "before": before,
        "after": after,
    }


def _words(bench: Workbench, tokens: Tensor) -> str:
    found: str = bench.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    return found


def write_adapters(bench: Workbench, state: ServerState, folder: Path) -> list[Path]:
    """Write the final adapter below ``folder`` and return the folders written.

    ``adapter/`` is the global adapter, together with the residual of the base weights where the
    method has one; ``adapters/CLIENT/`` where every client has a model of its own. An adapter that
    is no LoRA is also written as plain LoRA, ``adapter-lora/``, which PEFT loads without fedcore.
    A run without adapter leaves its head in ``head/``.
    """
    if bench.method.family == "none":
        head = folder / "head"
        tensors = {s.name: state.layout.view(state.row, s).clone() for s in state.layout}
        write_tensors(tensors, head / "model.safetensors")
        return [head]
    if bench.method.traits.personalised:
        return [
            path
            for client in sorted(state.simulated_clients)
            for path in _write(bench, client_row(bench, state, client), folder / "adapters", client)
        ]
    if state.residual:
        adapter = with_residual(adapter_state(bench.model, state.row, bench), state.residual)
        return [write_adapter(adapter, folder / "adapter")]
    return _write(bench, state.row, folder, "adapter")


def _write(bench: Workbench, row: Tensor, folder: Path, name: str) -> list[Path]:
    written = [write_adapter(adapter_state(bench.model, row, bench), folder / name)]
    if bench.method.family != "lora":
        from fedcore.tuners import export_lora

        export_lora(written[0], folder / f"{name}-lora")
        written.append(folder / f"{name}-lora")
    return written


def adapter_state(model: nn.Module, row: Tensor, bench: Workbench) -> AdapterState:
    """The model's adapter with the values of ``row``."""
    bench.binding.load(row)
    return live_adapter(model, "the final adapter")
