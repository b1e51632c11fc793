"""The adapters a run ends with, as folders that PEFT loads."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from fedcore.data.adapter_state import AdapterState
from fedcore.data.peft_files import write_adapter, write_tensors
from fedcore.data.plain_lora import with_residual
from fedcore.data.server_state import ServerState
from fedcore.engines.client_models import client_row
from fedcore.engines.workbench import Workbench
from fedcore.training.live_adapter import live_adapter


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
            for client in sorted(state.private)
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
