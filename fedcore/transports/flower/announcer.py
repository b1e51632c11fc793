"""Each round's announcement, made from what a strategy was given of the adapter and the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedcore.data.adapter_kind import kind_of
from fedcore.data.adapter_state import declared_rank_and_scaling
from fedcore.data.announcement import Announcement, broadcast_identity
from fedcore.data.base_identity import BaseIdentity, check_allow
from fedcore.data.folders import read_object
from fedcore.data.peft_files import CONFIG_FILE
from fedcore.errors import FedcoreError
from fedcore.federation.state import ServerState
from fedcore_kernels.layout import FactorLayout


class Announcer:
    """What one strategy announces.

    Args:
        config: of the adapter, ``adapter_config.json`` as a mapping or the folder that holds it;
            None where it is not known.
        base: the base model; by default what ``base.json`` in that folder says.
        allow: parts of the base that may differ.

    Raises:
        FedcoreError: a file is missing or malformed, or a base has no such part.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | str | Path | None = None,
        base: BaseIdentity | None = None,
        allow: Iterable[str] = (),
    ) -> None:
        if isinstance(config, str | Path):
            folder = Path(config)
            base = base or BaseIdentity.read(folder)
            config = read_object(folder / CONFIG_FILE, str(folder))
        self._config, self._base, self._allow = config, base, check_allow(allow)
        self._scaling: dict[str, float] = {}
        self._newest: tuple[ServerState, Announcement] | None = None
        self.total_rounds: int | None = None
        """How many rounds the run has; None before it starts."""

    def fit(self, layout: FactorLayout) -> None:
        """Compare the configuration with the adapter, whose layout is ``layout``.

        Raises:
            FedcoreError: it is not that adapter's.
        """
        if self._base is not None:
            self._base = self._base.without(slot.name for slot in layout.dense_slots)
        if self._config is None:
            return
        for slot in layout.factor_slots:
            rank, self._scaling[slot.module] = declared_rank_and_scaling(self._config, slot.module)
            if rank != slot.rows:
                raise FedcoreError(
                    f"adapter_config says that module {slot.module} has rank {rank}, the adapter "
                    f"has {slot.rows}; pass the configuration of the initial adapter"
                )

    def announce(self, state: ServerState, constants: Mapping[str, Tensor]) -> Announcement:
        """What the server knows of the round after ``state``; hashed once for each state."""
        if self._newest is None or self._newest[0] is not state:
            identity = broadcast_identity(state.row, state.layout, constants, state.residual)
            kind = {} if self._config is None else kind_of(self._config)
            announced = Announcement(
                state.round,
                identity,
                kind,
                self._scaling,
                self._base,
                self._allow,
                self.total_rounds,
            )
            self._newest = state, announced
        return self._newest[1]
