"""Flower's secure aggregation, behind which a server sees the mean of the uploads and no upload.

Flower has the protocol (SecAgg and SecAgg+) for its older strategies alone, those of
``flwr.server``, whose parameters are lists without names. The names travel in the configuration::

    strategy = SecureFedLoRA("fedit", get_peft_model_state_dict(model))
    context = LegacyContext(context, ServerConfig(num_rounds=10), strategy)
    DefaultWorkflow(fit_workflow=SecAggPlusWorkflow(3, 2, max_weight=500.0))(grid, context)

and in a client's ``fit``, behind ``secaggplus_mod``::

    set_peft_model_state_dict(model, named_tensors(parameters, config))
    ...
    return upload_arrays(get_peft_model_state_dict(model), config), num_examples, {}

The workflow rounds to a grid: with clip c and L levels (8 and 2^22 by default) every number of
the mean is off by less than ``2 c / L x max_weight / mean(num_examples)``, so ``max_weight`` is
best the largest client's number of examples. Numbers are silently clipped where
``|value| x num_examples / max_weight`` exceeds c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from logging import WARNING
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.common import (
    FitRes,
    NDArrays,
    Parameters,
    ndarrays_to_parameters,
)
from flwr.common.logger import log
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg
from torch import Tensor

from fedcore.checks import count
from fedcore.data.claims import claimed
from fedcore.data.npy import NpyArray
from fedcore.data.rows import slot_name
from fedcore.errors import FedcoreError
from fedcore.federation.checkpoints import begin, save
from fedcore.federation.server_round import OpenRound
from fedcore.federation.state import ServerState
from fedcore.methods import Method, create_method
from fedcore.methods.requirements import SECURE_SUM, SENDS_FACTORS, check_start, refuse
from fedcore.transports.flower.messages import KeyMap

_KEYS, _SENDS, _ROUND = "fedcore.keys", "fedcore.sends", "fedcore.round"


class SecureFedLoRA(FedAvg):
    """A strategy for Flower's secure aggregation workflows, with any method that needs sums alone.

    Every client gets the whole adapter. Clients that drop out within a round cost the protocol
    their shares and the mean their examples; the rest is the workflow's to recover.

    Args:
        method: by name, or an instance with options of its own.
        adapter: the state dict to start from, by PEFT's keys.
        checkpoint_dir: a state is written there at the start and after every round.
        resume: continue from the newest state in ``checkpoint_dir``, if there is one; the
            workflow's number of rounds counts from there.
        min_cohort: the fewest clients of positive weight that a sum may be of, two or more; a round
            of fewer keeps the adapter and is flagged.
        fedavg: keyword arguments of Flower's older FedAvg.

    Raises:
        FedcoreError: a method that needs single uploads, an adapter of another family, or states
            that do not fit.
    """

    def __init__(
        self,
        method: str | Method,
        adapter: Mapping[str, Tensor],
        *,
        checkpoint_dir: str | Path | None = None,
        resume: bool = False,
        min_cohort: int = 2,
        **fedavg: Any,
    ) -> None:
        self.method = create_method(method) if isinstance(method, str) else method
        self._min_cohort = count("", "min_cohort", min_cohort, least=2)
        otherwise = "take round.secure_sum of a recipe"
        refuse(self.method, (*SECURE_SUM, SENDS_FACTORS), "Flower's secure aggregation", otherwise)
        self.key_map, row = KeyMap.of(adapter)
        check_start(self.method, self.key_map.family, self.key_map.keys.values(), "adapter")
        self._folder = Path(checkpoint_dir) if checkpoint_dir is not None else None
        fresh = ServerState(round=0, layout=self.key_map.layout, row=row)
        with claimed(self._folder):
            self.state = begin(self._folder, resume, fresh)
        for name in ("on_fit_config_fn", "on_evaluate_config_fn"):
            fedavg[name] = self._configured(fedavg.get(name))
        super().__init__(initial_parameters=self._parameters(), **fedavg)

    def adapter(self) -> dict[str, Tensor]:
        """The global adapter, by the keys of the one it started from."""
        tensors = self.key_map.pack(self.state.row, self.state.layout)
        constants = {
            self.key_map.keys[name]: value for name, value in self.key_map.constants.items()
        }
        return tensors | constants

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[Any]:
        """FedAvg's, always with this strategy's own state: a round that failed changes nothing."""
        return super().configure_fit(server_round, self._parameters(), client_manager)

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: Any,
    ) -> tuple[Parameters | None, dict[str, Any]]:
        """The method's server half on the mean, which the workflow puts in place of every upload.

        Raises:
            FedcoreError: uploads that differ, so no workflow summed them; a mean of other tensors
                or shapes than this round's, or with values that are not finite.
        """
        if not results:
            return None, {}
        state, t = self.state, self.state.round
        uploads = [_read(result.parameters, f"round {t}: an upload") for _, result in results]
        if any(not _equal(uploads[0], other) for other in uploads[1:]):
            raise FedcoreError(
                f"round {t}: the uploads differ, so nobody summed them before the server saw them; "
                "run SecureFedLoRA in DefaultWorkflow(fit_workflow=SecAggPlusWorkflow(...))"
            )
        # Whose uploads are in the sum is not for the server to see, so nobody counts as up to date.
        opened = OpenRound(self.method, state, ())
        names = [slot.name for slot in opened.layout]
        if len(uploads[0]) != len(names):
            raise FedcoreError(
                f"round {t}: the mean has {len(uploads[0])} tensors, not {len(names)}"
            )
        tensors = {
            self.key_map.keys[name]: torch.from_numpy(np.asarray(array, dtype=np.float64))
            for name, array in zip(names, uploads[0], strict=True)
        }
        try:
            mean = self.key_map.unpack(tensors, opened.layout)
        except FedcoreError as error:
            raise FedcoreError(f"round {t}: the mean does not fit: {error}") from None
        weighted = sum(result.num_examples > 0 for _, result in results)
        if weighted < self._min_cohort:
            after = self._skipped(opened, weighted)
        else:
            after = opened.close_on_mean(mean).state
        after = replace(after, record={**after.record, "uploads": len(results)})
        with claimed(self._folder):
            save(after, self._folder)
        self.state = after
        metrics = {}
        if self.fit_metrics_aggregation_fn is not None:
            reports = [(result.num_examples, result.metrics) for _, result in results]
            metrics = self.fit_metrics_aggregation_fn(reports)
        return self._parameters(), metrics

    def _skipped(self, opened: OpenRound, weighted: int) -> ServerState:
        """The state after a round whose sum is of too few clients: without it, and flagged."""
        flag = (
            f"{weighted} of the clients in the sum have weight, fewer than min_cohort = "
            f"{self._min_cohort}: the round keeps the global state"
        )
        log(WARNING, "round %s: %s", self.state.round, flag)
        after = opened.close().state
        return replace(after, record={**after.record, "flags": [flag, *after.record["flags"]]})

    def _parameters(self) -> Parameters:
        return ndarrays_to_parameters([tensor.numpy() for tensor in self.adapter().values()])

    def _configured(self, own: Callable[[int], dict[str, Any]] | None) -> Callable[[int], Any]:
        """A configuration function: what the caller's own one says, and the names."""

        def config(server_round: int) -> dict[str, Any]:
            sent = self.method.upload_layout(self.state.layout, self.state.round)
            return {
                **(own(server_round) if own is not None else {}),
                _KEYS: "\n".join(self.adapter()),
                _SENDS: "\n".join(self.key_map.keys[slot.name] for slot in sent),
                _ROUND: self.state.round,
            }

        return config


def named_tensors(parameters: Sequence[np.ndarray], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Key to tensor of the adapter that a client's ``fit`` or ``evaluate`` received.

    Raises:
        FedcoreError: ``config`` is not of :class:`SecureFedLoRA`, or of another number of tensors.
    """
    keys = _listed(config, _KEYS)
    if len(keys) != len(parameters):
        raise FedcoreError(f"{len(parameters)} tensors were received for {len(keys)} keys")
    return {key: torch.tensor(array) for key, array in zip(keys, parameters, strict=True)}


def upload_arrays(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> NDArrays:
    """What a client's ``fit`` returns: the tensors that this round sends, in its order.

    Args:
        tensors: by any spelling of PEFT's keys; others than those that are sent are left out.
        config: as ``fit`` received it.

    Raises:
        FedcoreError: a tensor is missing or holds values that are not finite, which would spoil the
            sum for everybody.
    """
    by_name = {slot_name(key): tensor for key, tensor in tensors.items()}
    arrays = []
    for key in _listed(config, _SENDS):
        if slot_name(key) not in by_name:
            raise FedcoreError(f"{key} is missing")
        tensor = by_name[slot_name(key)].detach().cpu()
        if not torch.isfinite(tensor).all():
            raise FedcoreError(f"{key} holds values that are not finite")
        # NumPy has fp64 and fp32; narrower formats are summed as fp32.
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()
        arrays.append(wide.contiguous().numpy())
    return arrays


def _listed(config: Mapping[str, Any], name: str) -> list[str]:
    text = config.get(name)
    if not isinstance(text, str):
        raise FedcoreError(f"the configuration has no {name}; the server runs no SecureFedLoRA")
    return text.split("\n")


def _read(parameters: Parameters, what: str) -> NDArrays:
    try:
        return [NpyArray.open(data).tensor().numpy() for data in parameters.tensors]
    except FedcoreError as error:
        raise FedcoreError(f"{what} cannot be read: {error}") from None


def _equal(one: NDArrays, other: NDArrays) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and np.array_equal(a, b, equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )
