"""Which broadcast a Trainer's training started from, and which its checkpoints belong to.

``trainer.train(resume_from_checkpoint=True)`` loads the newest checkpoint of the output folder over
whatever the model holds. In the next round that is the last round's: the broadcast is overwritten,
and the upload is that of the round before. So a checkpoint bears the round and the broadcast that
it belongs to, and training starts from the broadcast or from such a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcore.data.folders import read_object, write_text
from fedcore.data.validation import digest
from fedcore.errors import FedcoreError
from fedcore.training.binding import ModelBinding
from fedcore_kernels.layout import FactorLayout

CHECKPOINT_FILE = "fedcore.json"
"""Beside a checkpoint: the round, the identity of the broadcast, and a digest of what trains."""


@dataclass(frozen=True)
class Start:
    """What a round's training starts from.

    Attributes:
        round: of the broadcast.
        broadcast: its identity.
        layout: of what trains.
        row: ``(P,)`` in that layout, as it was received.
    """

    round: int
    broadcast: str
    layout: FactorLayout
    row: Tensor

    def mark(self, binding: ModelBinding, arguments: Any, step: int) -> None:
        """Write to which broadcast the checkpoint of ``step`` belongs, where there is one.

        Raises:
            FedcoreError: it cannot be written.
        """
        folder = Path(arguments.output_dir) / f"checkpoint-{step}"
        if folder.is_dir():
            about = {**self._names(), "values": self._digest(binding)}
            text = json.dumps(about, indent=2, sort_keys=True)
            write_text(text + "\n", folder / CHECKPOINT_FILE)

    def check(self, binding: ModelBinding, arguments: Any, step: int = 0) -> tuple[str, ...]:
        """Compare what the model is about to train with what was received.

        Values that a Trainer has rounded to a narrower dtype are accepted, and flagged.

        Args:
            step: where the Trainer continues; above 0 it has loaded a checkpoint.

        Returns:
            Flags for the upload.

        Raises:
            FedcoreError: the model holds other values, or a checkpoint, that are not those of a
                checkpoint of this round.
        """
        if step > 0:
            # Its values may equal the broadcast's, as those of a federation of one client do.
            return self._resumed(binding, arguments, f"the Trainer continues at step {step}")
        rounded = set()
        values = binding.read(self.layout)
        for slot in self.layout:
            dtype = binding.parameters[slot.name].dtype
            received, now = (self.layout.view(row, slot) for row in (self.row, values))
            if torch.equal(now.to(received.dtype), received):
                continue
            if not torch.equal(now.to(dtype), received.to(dtype)):
                return self._resumed(binding, arguments, f"{slot.name} holds other values")
            rounded.add(str(dtype).removeprefix("torch."))
        return tuple(
            f"training started from values rounded to {dtype}" for dtype in sorted(rounded)
        )

    def _names(self) -> dict[str, Any]:
        return {"round": self.round, "broadcast": self.broadcast}

    def _digest(self, binding: ModelBinding) -> str:
        return digest(binding.read(self.layout), self.layout)

    def _resumed(self, binding: ModelBinding, arguments: Any, why: str) -> tuple[str, ...]:
        """The flag for a model that holds a checkpoint of this round; refuse any other."""
        wanted = {**self._names(), "values": self._digest(binding)}
        for about in _marks(arguments):
            if {name: about.get(name) for name in wanted} == wanted:
                return ("training resumed from a checkpoint of this round",)
        raise FedcoreError(
            f"round {self.round}: training would not start from the broadcast: {why}, as after "
            "resume_from_checkpoint of another round; call receive again and train without "
            "resume_from_checkpoint, or give each round an output_dir of its own"
        )


def _marks(arguments: Any) -> Iterator[dict[str, Any]]:
    """What is written beside the checkpoints that ``arguments`` may have loaded."""
    folders = [*Path(arguments.output_dir).glob("checkpoint-*")]
    named = getattr(arguments, "resume_from_checkpoint", None)
    if isinstance(named, str):
        folders.append(Path(named))
    for folder in folders:
        file = folder / CHECKPOINT_FILE
        if file.is_file():
            yield read_object(file, "the checkpoint")
