"""NVFlare: an aggregator that runs any of our methods, and what its clients receive and send.

Written for NVFlare 2.9. The aggregator keeps the global adapter itself, so a method sees the state
that its clients started from; the controller's model is replaced by it whole (``FULL``) each round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from fedcore.checks import choice, is_number
from fedcore.data.adapter_state import AdapterState
from fedcore.data.announcement import Announcement
from fedcore.data.base_identity import BaseIdentity, check_allow
from fedcore.data.exchange import BroadcastFolder
from fedcore.data.peft_files import read_adapter, write_adapter
from fedcore.data.rows import row_from_tensors, tensors_from_row
from fedcore.data.validation import (
    OnInvalid,
    Weighting,
    check_rounds,
    one_number,
    refuse_ranks,
)
from fedcore.errors import FedcoreError, missing_extra, printable
from fedcore.federation.acceptance import MAX_GROWTH, Limits
from fedcore.federation.announcements import with_agreed
from fedcore.federation.checkpoints import newest_or, save
from fedcore.federation.server_round import OpenRound
from fedcore.federation.state import ServerState
from fedcore.methods import create_method
from fedcore.methods.requirements import KEEPS_BASE, ONE_BROADCAST, check_start, refuse

try:
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
    from nvflare.app_common.abstract.model import make_model_learnable
    from nvflare.app_common.abstract.model_persistor import ModelPersistor
    from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
except ImportError as error:
    raise missing_extra("nvflare", "nvflare") from error

if TYPE_CHECKING:
    from fedcore.training.trainer_client import FederatedClient

NUM_STEPS = "NUM_STEPS_CURRENT_ROUND"
"""Where NVFlare's own aggregators look for a client's weight."""

ANNOUNCED = "fedcore"
"""The entry of a model's meta that holds what the server announces and clients repeat."""


@dataclass(frozen=True)
class _Received:
    """One upload: its row, weight and metrics and what it says, or what is wrong with it."""

    row: Tensor | None = None
    weight: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    said: Announcement | None = None
    problem: str = ""


class FedLoRAAggregator(ModelAggregator):  # type: ignore[misc,unused-ignore]
    """Aggregates PEFT adapters by one of our methods, for the ``aggregator`` of a FedAvg recipe.

    Clients send ``FULL`` parameters by PEFT's keys: what the method's plan sends in the round. They
    may send the rest of the adapter too if it is as it was broadcast. Everything is checked by
    name, and uploads are aggregated in the order of their clients' names, whenever they came.

    Args:
        adapter: folder of the PEFT adapter that all start from, on the server; a ``base.json`` in
            it says which base model every client has to hold.
        method: its name.
        options: the method's own.
        weight_key: the entry of ``FLModel.meta`` that holds a client's weight.
        on_invalid: ``"raise"`` ends the job at the first invalid upload, ``"drop"`` leaves it out.
        checkpoints: folder for the state after every round, from which a job that is started again
            resumes; give the controller that round as its ``start_round``.
        allow_identical_uploads: accept a round in which all uploads are identical.
        weighting: by the weights that clients report, or all alike.
        max_growth: how many times as large as state and uploads a result may be; a larger one
            leaves the state as it is, with a warning.
        largest_share: of the total weight, that one client may have; None sets no bound.
        allow: parts of the base that may differ, each flagged in the record of every round.
        plain_clients: accept uploads that repeat nothing of what was announced, of clients that
            never did.

    Methods that send each client something of its own, or update base weights, are refused: an
    aggregator of NVFlare answers with one model of the adapter's tensors.

    Raises:
        FedcoreError: the adapter is not of the method's family, or the method is refused.
    """

    def __init__(
        self,
        adapter: str,
        method: str = "fedit",
        options: dict[str, Any] | None = None,
        weight_key: str = NUM_STEPS,
        on_invalid: OnInvalid = "raise",
        checkpoints: str | None = None,
        allow_identical_uploads: bool = False,
        weighting: Weighting = "examples",
        max_growth: float = MAX_GROWTH,
        largest_share: float | None = None,
        allow: Sequence[str] = (),
        plain_clients: bool = True,
    ) -> None:
        super().__init__()
        # Jobs are written as the arguments of their components, found by these names.
        self.adapter, self.method, self.options = adapter, method, options
        self.weight_key, self.on_invalid, self.checkpoints = weight_key, on_invalid, checkpoints
        self.allow_identical_uploads = allow_identical_uploads
        self.weighting: Weighting = weighting
        self.max_growth, self.largest_share = max_growth, largest_share
        choice("FedLoRAAggregator", "weighting", weighting, get_args(Weighting))
        self._limits = Limits(max_growth, largest_share)
        self.allow, self.plain_clients = allow, plain_clients
        if on_invalid not in ("raise", "drop"):
            raise FedcoreError(f"on_invalid is {on_invalid!r}; pass 'raise' or 'drop'")
        self._method = create_method(method, **(options or {}))
        needs = (*ONE_BROADCAST, KEEPS_BASE)
        refuse(self._method, needs, "a job of NVFlare", "take another engine")
        self._start = read_adapter(adapter)
        check_start(
            self._method,
            self._start.family,
            self._start.keys.values(),
            "adapter",
            self._start.config,
        )
        check_rounds(self._start, "adapter")
        refuse_ranks(self._start, "adapter")
        self._state = _begin(self._start, checkpoints)
        self._announced = _served(self._start, self._state, adapter, allow).announcement
        self._received: dict[str, _Received] = {}

    @property
    def state(self) -> ServerState:
        """After the last round."""
        return self._state

    def accept_model(self, model: Any) -> None:
        """Keep one client's upload; what is wrong with it is said when all are there."""
        client, received = "", _Received()
        try:
            meta = dict(model.meta or {})
            client = printable(meta.get("client_name", ""))
            if not client:
                raise FedcoreError("its meta has no client_name")
            said = _announcement(meta)
            row, weight = self._row(model), self._weight(meta)
            received = _Received(row, weight, _numbers(model.metrics), said)
        except FedcoreError as error:
            received = _Received(problem=str(error))
        except Exception as error:
            # Whatever an upload does to the code that reads it is the fault of that client.
            received = _Received(problem=f"it cannot be read ({type(error).__name__})")
        if client in self._received:
            received = _Received(problem="it reported twice")
        self._received[client] = received

    def aggregate_model(self) -> Any:
        """The next global adapter, whole, with the clients' metrics averaged by weight.

        Raises:
            FedcoreError: an upload is invalid and ``on_invalid`` is ``"raise"``; the state is then
                as it was.
        """
        state, method, t = self._state, self._method, self._state.round
        received, self._received = self._received, {}
        opened = OpenRound(
            method,
            state,
            list(received),
            on_invalid=self.on_invalid,
            allow_identical_uploads=self.allow_identical_uploads,
            limits=self._limits,
            announced=self._announced,
            plain_clients=self.plain_clients,
        )
        for client in sorted(received):
            upload = received[client]
            if upload.row is None:
                opened.refuse(client, upload.problem)
                continue
            try:
                opened.check_repeats(client, upload.said)
            except FedcoreError as error:
                opened.refuse(client, str(error))
                continue
            opened.receive(client, upload.row, upload.weight)
        closed = opened.close()
        cohort, self._state = closed.cohort, closed.state
        for drop in cohort.dropped:
            self.warning(f"round {t}: {drop.client_id} was left out: {drop.reason}")
        for flag in closed.flags:
            self.warning(f"round {t}: {flag}")
        served = _served(self._start, self._state, self.adapter, self.allow)
        self._announced = served.announcement
        if self.checkpoints is not None:
            save(self._state, Path(self.checkpoints))
        weights = dict(zip(cohort.client_ids, cohort.weights.tolist(), strict=True))
        metrics = {client: received[client].metrics for client in weights}
        return FLModel(
            params_type=ParamsType.FULL,
            params=_arrays(served.adapter),
            metrics=_mean_metrics(metrics, weights),
            current_round=t,
            meta={ANNOUNCED: with_agreed(self._announced, self._state).text()},
        )

    def reset_stats(self) -> None:
        """Forget the uploads of a round that was not aggregated."""
        self._received = {}

    def global_params(self) -> dict[str, Any]:
        """The global adapter by PEFT's keys, as NumPy arrays."""
        return _arrays(self._start.with_row(self._state.row, self._state.layout))

    def _row(self, model: Any) -> Tensor:
        state, t = self._state, self._state.round
        if model.params_type != ParamsType.FULL:
            raise FedcoreError(f"it sent {model.params_type} parameters; send FULL ones")
        if model.current_round is not None and model.current_round != t:
            raise FedcoreError(f"its upload is for round {model.current_round}")
        sent = self._method.upload_layout(state.layout, t)
        frozen = self._method.frozen_layout(state.layout, t)
        # What was sent beyond the plan has to be as it was broadcast.
        unchanged = tensors_from_row(state.layout.gather(state.row, frozen), frozen)
        unchanged |= self._start.constants
        tensors = {key: _tensor(key, value) for key, value in model.params.items()}
        return row_from_tensors(tensors, sent, held=unchanged)

    def _weight(self, meta: Mapping[str, Any]) -> float:
        if self.weighting == "uniform":
            return 1.0
        weight = meta.get(self.weight_key)
        if not is_number(weight):
            raise FedcoreError(f"its meta has {self.weight_key} = {weight!r:.60}; pass its weight")
        return one_number(self.weight_key, weight)


class AdapterPersistor(ModelPersistor):  # type: ignore[misc,unused-ignore]
    """The model of a job is a PEFT adapter: it starts from one folder and is saved to another.

    Args:
        adapter: folder of the adapter that the job starts from; the aggregator's.
        out: folder that holds the newest global adapter, which PEFT loads.
        checkpoints: the aggregator's, if it has them.
        allow: the aggregator's, if it has any.
    """

    def __init__(
        self,
        adapter: str,
        out: str,
        checkpoints: str | None = None,
        allow: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.adapter, self.out, self.checkpoints = adapter, out, checkpoints
        self.allow = allow

    def load_model(self, fl_ctx: Any) -> Any:
        """What the aggregator takes for broadcast in its first round."""
        start = read_adapter(self.adapter)
        state = _begin(start, self.checkpoints)
        served = _served(start, state, self.adapter, self.allow)
        announced = with_agreed(served.announcement, state)
        return make_model_learnable(_arrays(served.adapter), {ANNOUNCED: announced.text()})

    def save_model(self, model: Any, fl_ctx: Any) -> None:
        """Write the global adapter."""
        tensors = {key: _tensor(key, value) for key, value in model["weights"].items()}
        config = read_adapter(self.adapter).config
        write_adapter(AdapterState.from_peft(tensors, config, name="the global model"), self.out)


def receive(client: FederatedClient, model: Any) -> None:
    """Load what the server sent (``flare.receive()``) into the client's model.

    Raises:
        FedcoreError: it does not fit, or is not what the server announced; see
            :meth:`FederatedClient.receive`.
    """
    tensors = {key: _tensor(key, value) for key, value in model.params.items()}
    adapter = AdapterState.from_peft(tensors, client.outline.config, name="the global model")
    # Rounds count on where a job that is started again begins; its number of rounds does not.
    total = None if model.total_rounds is None else (model.start_round or 0) + model.total_rounds
    client.receive(
        adapter,
        round=model.current_round,
        announced=_announcement(model.meta or {}),
        total_rounds=total,
    )


def reply(client: FederatedClient) -> Any:
    """What ``flare.send`` takes after training: the round's upload, with the client's examples as
    its weight. It holds tensors, as a job for PyTorch wants them: it leaves out arrays.

    Raises:
        FedcoreError: a frozen factor changed, or a value is not finite.
    """
    upload, layout = client.prepare(), client.upload_layout
    keys = client.outline.keys
    params = {
        keys.get(name, name): tensor
        for name, tensor in tensors_from_row(upload.row, layout).items()
    }
    meta = {NUM_STEPS: client.examples, ANNOUNCED: client.announcement.text()}
    return FLModel(
        params_type=ParamsType.FULL, params=params, current_round=client.round, meta=meta
    )


def _announcement(meta: Mapping[str, Any]) -> Announcement | None:
    text = meta.get(ANNOUNCED)
    return None if text is None else Announcement.parse(text, "its meta")


def _begin(start: AdapterState, checkpoints: str | None) -> ServerState:
    """The newest state in ``checkpoints``, or the one that ``start`` is."""
    layout = start.layout()
    fresh = ServerState(round=0, layout=layout, row=start.to_row(layout))
    return newest_or(fresh, None if checkpoints is None else Path(checkpoints))


def _served(
    start: AdapterState, state: ServerState, folder: str, allow: Sequence[str]
) -> BroadcastFolder:
    """What the clients of the round after ``state`` receive, as a folder would hold it."""
    adapter = start.with_row(state.row, state.layout)
    base = BaseIdentity.read(folder)
    if base is not None:
        base = base.without(slot.name for slot in state.layout.dense_slots)
    return BroadcastFolder(adapter, state.round, "", base=base, allow=check_allow(allow))


def _arrays(adapter: AdapterState) -> dict[str, Any]:
    # NumPy has fp64 and fp32; narrower formats travel as fp32.
    return {
        key: (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()
        for key, tensor in adapter.to_peft().items()
    }


def _tensor(key: str, value: Any) -> Tensor:
    """A tensor from whatever a transport makes of one: arrays, tensors, references to a file."""
    if hasattr(value, "materialize"):
        value = value.materialize()
    try:
        tensor = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise FedcoreError(f"{key} is a {type(value).__name__}, not a tensor: {error}") from error
    if not tensor.is_floating_point():
        raise FedcoreError(f"{key} has dtype {tensor.dtype}; a float dtype is needed")
    return tensor


def _numbers(metrics: Any) -> dict[str, float]:
    """The numbers among a client's metrics; text is left out."""
    return {
        printable(name): one_number(name, value)
        for name, value in dict(metrics or {}).items()
        if is_number(value)
    }


def _mean_metrics(
    metrics: Mapping[str, Mapping[str, float]], weights: Mapping[str, float]
) -> dict[str, float] | None:
    """The weighted mean of every number that all clients report."""
    if not metrics:
        return None
    total = sum(weights.values())
    names = set.intersection(*(set(reported) for reported in metrics.values()))
    # Shares first: a product of a finite number and a weight may overflow, a mean does not.
    means = {
        name: sum(reported[name] * (weights[c] / total) for c, reported in metrics.items())
        for name in sorted(names)
    }
    return means or None
