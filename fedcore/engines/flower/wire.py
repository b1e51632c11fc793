"""The keys of the adapter that an app started from, for whatever travels in its messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedcore.data.adapter_state import AdapterState
from fedcore.data.keyed_rows import Ranks, row_from_tensors, slot_name, tensors_from_row
from fedcore.errors import FedcoreError
from fedcore_kernels.layout import FactorLayout


@dataclass(frozen=True)
class Wire:
    """Which key each slot of a row travels under.

    Attributes:
        layout: every factor and dense tensor of the adapter, at the server's ranks.
        keys: slot name to key, as the first adapter had them.
        family: of the adapter.
        constants: name to tensor that nobody changes (initial factors, stored frames).
    """

    layout: FactorLayout
    keys: Mapping[str, str]
    family: str
    constants: Mapping[str, Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> tuple[Wire, Tensor]:
        """The wire of the adapter ``tensors``, by PEFT's keys, and its row ``(P,)`` fp32.

        Raises:
            FedcoreError: no tensor, integers, several adapter families, two keys of one meaning, a
                factor without its partner, or a factor that is no matrix.
        """
        adapter = AdapterState.from_tensors(tensors)
        layout = adapter.layout()
        wire = cls(layout, adapter.keys, adapter.family, adapter.constants)
        return wire, adapter.to_row(layout).float()

    def pack(
        self, row: Tensor, part: FactorLayout, ranks: Ranks | None = None
    ) -> dict[str, Tensor]:
        """The tensors of ``row``, which is of layout ``part``, as a client of ``ranks`` holds them.

        Rows beyond a client's rank are left out.
        """
        found = tensors_from_row(row, part, ranks)
        return {self.keys[name]: tensor for name, tensor in found.items()}

    def unpack(
        self,
        tensors: Mapping[str, Tensor],
        part: FactorLayout,
        ranks: Ranks | None = None,
        held: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The row ``(P,)`` of layout ``part``; see :func:`row_from_tensors`.

        Args:
            held: slot name to what else may be there, if it is equal, besides the constants.
        """
        return row_from_tensors(tensors, part, ranks, {**self.constants, **(held or {})})

    def part_of(self, tensors: Mapping[str, Tensor]) -> FactorLayout:
        """The part of the layout that ``tensors`` name; constants are no part of it.

        Raises:
            FedcoreError: a key that the adapter does not have.
        """
        names = {slot_name(key) for key in tensors} - set(self.constants)
        unknown = sorted(names - set(self.layout.by_name))
        if unknown:
            raise FedcoreError(f"{unknown[0]} is no tensor of the adapter")
        return self.layout.part(names)
