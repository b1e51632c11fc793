"""What a client keeps between two rounds, in its node's context; it never leaves the node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from fedcore.data.low_rank import LowRank, packed, unpacked
from fedcore.engines.flower.arrays import from_arrays, to_arrays

_ROW, _OWN, _RESIDUAL, _RUN = (f"fedcore.{name}" for name in ("row", "own", "residual", "run"))


@dataclass(frozen=True)
class Memory:
    """A client's memory.

    Attributes:
        row: ``(P,)`` the shared row of the last round, None before the first.
        own: named tensors that stay with the client.
        residual: module to the update of the base weights.
    """

    row: Tensor | None = None
    own: Mapping[str, Tensor] = field(default_factory=dict)
    residual: Mapping[str, LowRank] = field(default_factory=dict)

    @classmethod
    def read(cls, state: RecordDict, run: str) -> Memory:
        """The memory of ``run`` in a context's ``state``; an empty one where that is another's."""
        if _RUN not in state.config_records or state.config_records[_RUN]["run"] != run:
            return cls()
        tensors = {
            name: from_arrays(state.array_records[name])
            for name in (_ROW, _OWN, _RESIDUAL)
            if name in state.array_records
        }
        return cls(
            tensors[_ROW]["row"], tensors.get(_OWN, {}), unpacked(tensors.get(_RESIDUAL, {}))
        )

    def write(self, state: RecordDict, run: str) -> None:
        """Put the memory into a context's ``state``, in place of what is there."""
        state[_RUN] = ConfigRecord({"run": run})
        for name, tensors in (
            (_ROW, {} if self.row is None else {"row": self.row}),
            (_OWN, self.own),
            (_RESIDUAL, packed(self.residual)),
        ):
            if tensors:
                state[name] = to_arrays(tensors)
            elif name in state:
                del state[name]
