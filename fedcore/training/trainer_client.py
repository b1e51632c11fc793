"""A transformers ``Trainer`` script as a client of a federation that exchanges folders."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Subset

from fedcore.checks import count
from fedcore.data.adapter_kind import kind_of
from fedcore.data.adapter_state import AdapterState
from fedcore.data.announcement import Announcement, differences
from fedcore.data.base_identity import BaseIdentity
from fedcore.data.exchange import (
    BROADCAST_FILE,
    BroadcastFolder,
    UploadFolder,
    fixed_tensors,
    read_broadcast,
    write_upload,
)
from fedcore.data.peft_files import read_adapter, read_tensors, write_tensors
from fedcore.data.rows import row_from_tensors, tensors_from_row
from fedcore.data.validation import check_row, check_weight, digest
from fedcore.errors import FedcoreError, missing_extra
from fedcore.methods import create_method
from fedcore.methods.base import Broadcast, Method, Upload
from fedcore.methods.registry import options_of
from fedcore.training.base_identity import identity_of
from fedcore.training.binding import ModelBinding
from fedcore.training.checkpoints import Start
from fedcore.training.live_adapter import live_adapter
from fedcore.training.residual import FrozenResidual
from fedcore.training.round_checks import check_fits, check_holds, check_optimiser
from fedcore.training.round_draws import RoundDraws
from fedcore.training.schedules import Schedule, enter_schedule
from fedcore_kernels.layout import FactorLayout

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise missing_extra("transformers", "peft") from error


@dataclass
class _Round:
    """What the client is in the middle of."""

    broadcast: BroadcastFolder
    method: Method
    start: Start
    examples: float | None = None
    fresh: bool = False
    sent: bool = False
    flags: tuple[str, ...] = ()
    problem: str = ""


class FederatedClient(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Makes an unmodified ``Trainer`` script (or one of its subclasses) a federated client.

    A round is ``receive``, ``trainer.train()``, ``upload``. ``receive`` has to come before the
    Trainer builds its optimiser, so each round has a Trainer of its own; as a callback the client
    refuses an optimiser that would step a frozen factor or leave out one that trains. Example::

        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16))
        client = FederatedClient(model)
        client.receive("federation/broadcast/round-0003")
        trainer = Trainer(model, arguments, train_dataset=texts, callbacks=[client])
        trainer.train()
        client.upload("uploads/site-1")

    Used as a context manager it puts ``requires_grad`` back and takes the residual off at the end.

    Args:
        model: wrapped by PEFT, one adapter; ``trainer.model`` without further wrapping.
        method: by name, or an instance with options of its own; by default the broadcast says it,
            and it must not say another.
        round: the round, likewise.
        examples: the client's weight; the length of the Trainer's training set by default.
        private: folder for what stays with this client from one round to the next; needed where a
            method leaves factors or the head to the clients. It is never sent.
        tokenizer: the tokenizer or processor of the model, which is compared with the server's,
            its chat template too, where the server announces one.
        name: of the client; what it draws differs from what others draw.
        seed: of the federation's draws.

    Optimiser moments are not carried from one round to the next.

    Raises:
        FedcoreError: nothing of the model trains, or it has not one adapter called ``default``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        method: str | Method | None = None,
        round: int | None = None,
        examples: float | None = None,
        private: str | Path | None = None,
        tokenizer: Any = None,
        name: str = "",
        seed: int = 0,
    ) -> None:
        self._model = model
        self._outline = live_adapter(model)
        self._binding = ModelBinding.of(model)
        self._residual = FrozenResidual(model, self._binding.layout.modules)
        self._method = create_method(method) if isinstance(method, str) else method
        self._round_number = round
        self._examples = examples
        self._private = None if private is None else Path(private)
        self._trained_before = {name: p.requires_grad for name, p in model.named_parameters()}
        self._tokenizer = tokenizer
        self._bases: dict[str, BaseIdentity] = {}
        self._name, self._seed = name, count("FederatedClient", "seed", seed)
        self._seeds: dict[int, int] = {}
        self._now: _Round | None = None
        if examples is not None and (problem := check_weight(examples)):
            raise FedcoreError(f"examples: {problem}")

    def __enter__(self) -> FederatedClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self._residual.load({})
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self._trained_before[name])

    @property
    def round(self) -> int:
        """The round that was received."""
        return self._current().broadcast.round

    @property
    def total_rounds(self) -> int:
        """How many rounds the federation has.

        Raises:
            FedcoreError: the server did not say it.
        """
        total = self._current().broadcast.total_rounds
        if total is None:
            raise FedcoreError(
                "the broadcast does not say how many rounds there are; pass rounds to "
                "FileServer.create, or total_rounds to receive"
            )
        return total

    def round_seed(self) -> int:
        """A seed of this round and client alone, below 2^31: pass it as ``seed`` and
        ``data_seed`` of ``TrainingArguments``, so that rounds draw other batches and other dropout.
        """
        return self._draws().trainer_seed

    def round_examples(self, dataset: Any, count: int) -> Any:
        """The ``count`` examples of ``dataset`` that this round trains on.

        Over the rounds they go through all of it before one comes again, if ``count`` stays the
        same. The client's weight is still the length of the whole.

        Args:
            dataset: whatever has a length; of ``datasets``, or indexed by integers.
            count: optimiser steps by the examples of a step.

        Returns:
            A dataset of the same kind, or a ``torch.utils.data.Subset``.

        Raises:
            FedcoreError: an empty dataset, or ``count`` is below 1.
        """
        now = self._current()
        chosen = self._draws().examples(len(dataset), count)
        now.fresh = True
        if self._examples is None:
            now.examples = float(len(dataset))
        return dataset.select(chosen) if hasattr(dataset, "select") else Subset(dataset, chosen)

    def scheduler(
        self,
        optimiser: Optimizer,
        steps: int,
        name: str = "cosine",
        *,
        warmup_rounds: float = 0.0,
        **options: Any,
    ) -> LambdaLR:
        """A schedule of the learning rate over all rounds, entered where this one begins; for the
        Trainer's ``optimizers``.

        Args:
            optimiser: over what trains, with the highest rate; made after ``receive``.
            steps: optimiser steps of a round, the same in every round.
            name: as transformers calls it, of :data:`~fedcore.training.schedules.ScheduleName`.
            warmup_rounds: rounds over which the rate rises from 0.
            options: the schedule's own.

        Raises:
            FedcoreError: the number of rounds is not known or this one is beyond them, a number
                out of range, or an unknown schedule or option of it.
        """
        count("scheduler", "steps", steps, least=1)
        if self.round >= self.total_rounds:
            raise FedcoreError(
                f"scheduler: round {self.round} is beyond the {self.total_rounds} rounds of the "
                "federation, counted from 0; start the server with more rounds"
            )
        return enter_schedule(
            optimiser,
            Schedule(name, warmup_rounds, options),
            rate=max(group["lr"] for group in optimiser.param_groups),
            round=self.round,
            rounds=self.total_rounds,
            steps=steps,
        )

    @property
    def method(self) -> Method:
        """The federation's method."""
        return self._current().method

    @property
    def outline(self) -> AdapterState:
        """The model's adapter as it was at the beginning: its keys, shapes and configuration."""
        return self._outline

    @property
    def examples(self) -> float:
        """The client's weight in the round.

        Raises:
            FedcoreError: it is unknown.
        """
        examples = self._current().examples
        if examples is None:
            raise FedcoreError(
                "the number of examples is not known; pass examples, or train by a Trainer whose "
                "training set has a length"
            )
        return examples

    @property
    def announcement(self) -> Announcement:
        """What this round's upload repeats of its broadcast, and says of adapter and base."""
        return self._answer(self._current().broadcast)

    def receive(
        self,
        source: str | Path | AdapterState | Tensor,
        *,
        round: int | None = None,
        announced: Announcement | None = None,
        total_rounds: int | None = None,
    ) -> None:
        """Load the global values and freeze what the round's plan does not train.

        Args:
            source: a broadcast folder; or a PEFT folder, an adapter, or a row in the layout of this
                model's adapter, where the constructor received the method.
            round: of what is received; the constructor's by default.
            announced: what a transport's message says of a ``source`` that is not a broadcast
                folder.
            total_rounds: of the federation, where ``source`` or ``announced`` do not say it.

        Raises:
            FedcoreError: it is not of this model, base, method or round, or not what was announced;
                nothing has changed then.
        """
        if total_rounds is not None:
            count("FederatedClient.receive", "total_rounds", total_rounds, least=1)
        expected = self._round_number if round is None else round
        broadcast = self._broadcast(source, expected, announced)
        if broadcast.total_rounds is None:
            broadcast = replace(broadcast, total_rounds=total_rounds)
        method = create_method(broadcast.method, **broadcast.options)
        row = self._start(broadcast, method)
        frozen = method.frozen_layout(broadcast.layout, broadcast.round)
        check_fits(self._binding, self._outline, broadcast, method)
        problem, _ = differences(
            self._answer(broadcast), broadcast.announcement, allow=broadcast.allow
        )
        if problem is not None:
            raise FedcoreError(f"this client does not fit round {broadcast.round}: {problem}")
        check_holds(self._binding, row, broadcast.layout, frozen)
        self._binding.load(row, broadcast.layout)
        self._residual.load(broadcast.residual)
        trains = method.plan(broadcast.round).trains
        self._binding.trained(trains)
        layout = broadcast.layout
        part = layout.part(slot.name for slot in layout if slot.dense or slot.factor in trains)
        start = Start(broadcast.round, broadcast.identity, part, layout.gather(row, part))
        self._now = _Round(broadcast, method, start, self._examples)

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **rest: Any,
    ) -> None:
        """Refuse to train what was not received, from values that were not, or with an optimiser of
        another round.

        Raises:
            FedcoreError: naming the parameter.
        """
        now = self._current()
        if now.sent:
            raise FedcoreError(
                f"round {now.broadcast.round} was uploaded; receive the next one before training"
            )
        trains = now.method.plan(now.broadcast.round).trains
        check_optimiser(self._binding, trains, optimizer)
        if self._examples is None and not now.fresh:
            dataset = getattr(train_dataloader, "dataset", None)
            now.examples = float(len(dataset)) if isinstance(dataset, Sized) else None
        now.problem = ""
        try:
            now.flags = now.start.check(self._binding, args, getattr(state, "global_step", 0))
        except FedcoreError as error:
            now.problem = str(error)
            raise
        now.flags += self._seed_flags(args)

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Write beside a checkpoint to which broadcast it belongs."""
        self._current().start.mark(self._binding, args, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Refuse what the server would refuse: see :meth:`check`."""
        self.check()

    def check(self) -> None:
        """Compare the model with the broadcast.

        Raises:
            FedcoreError: a frozen factor or a constant changed, a tensor holds values that are not
                finite, or training was refused since it would have started from other values.
        """
        now = self._current()
        if now.problem:
            raise FedcoreError(now.problem)
        layout, t = now.broadcast.layout, now.broadcast.round
        frozen = now.method.frozen_layout(layout, t)
        values = self._binding.read(frozen)
        expected = layout.gather(now.broadcast.row, frozen)
        for slot in frozen:
            if not torch.equal(frozen.view(values, slot), frozen.view(expected, slot)):
                raise FedcoreError(f"round {t}: {slot.name} is frozen and changed in training")
        if self._frozen_digest(now) != now.broadcast.digest_of(frozen):
            raise FedcoreError(f"round {t}: a constant of the adapter changed in training")
        problem = check_row(self._binding.read(layout), layout)
        if problem:
            raise FedcoreError(f"round {t}: {problem}")

    def prepare(self) -> Upload:
        """What the method sends of this round, as a row of its upload layout; for transports of
        one's own. What it leaves to the client goes to ``private``.

        Raises:
            FedcoreError: see :meth:`check`.
        """
        self.check()
        now = self._current()
        layout, t = now.broadcast.layout, now.broadcast.round
        read = now.method.read_layout(layout, t)
        made = now.method.prepare_upload(
            self._binding.read(read), read, Broadcast(layout, now.broadcast.row), t
        )
        private = now.method.private_layout(layout, t)
        if len(private) and self._private is not None:
            tensors = tensors_from_row(self._binding.read(private), private)
            write_tensors(tensors, self._private / "private.safetensors")
        now.sent = True
        return replace(made, flags=(*now.flags, *made.flags))

    @property
    def upload_layout(self) -> FactorLayout:
        """The layout of what this round sends."""
        now = self._current()
        return now.method.upload_layout(now.broadcast.layout, now.broadcast.round)

    def upload(self, folder: str | Path) -> Path:
        """Write what the method sends of this round to ``folder``; an earlier upload is replaced.

        What the method leaves to the client goes to ``private`` first.

        Raises:
            FedcoreError: see :meth:`check`; or the number of examples is not known.
        """
        now = self._current()
        examples, made, said = self.examples, self.prepare(), self.announcement
        return write_upload(
            UploadFolder.of(said, made.row, examples, self._frozen_digest(now), made.flags),
            self.upload_layout,
            self._outline,
            Path(folder),
            factors=now.method.capabilities.uploads == "factors",
        )

    def _current(self) -> _Round:
        if self._now is None:
            raise FedcoreError("nothing was received; call receive before training")
        return self._now

    def _draws(self) -> RoundDraws:
        return RoundDraws(self._seed, self._name, self.round)

    def _seed_flags(self, arguments: Any) -> tuple[str, ...]:
        """What the server should know of the seed that the Trainer draws its examples by."""
        drawn = getattr(arguments, "data_seed", None)
        seed = arguments.seed if drawn is None else drawn
        flag = None if self._current().fresh else self._draws().flag(seed, self._seeds)
        self._seeds[self.round] = seed
        return () if flag is None else (flag,)

    def _frozen_digest(self, now: _Round) -> str:
        frozen = now.method.frozen_layout(now.broadcast.layout, now.broadcast.round)
        # Buffers that are rebuilt from a recipe are in no file; their recipe was compared.
        live = {name: self._binding.constants[name] for name in self._outline.constants}
        constants = fixed_tensors(live)
        return digest(self._binding.read(frozen), frozen, constants)

    def _answer(self, broadcast: BroadcastFolder) -> Announcement:
        mode = "sampled" if broadcast.base is None else broadcast.base.mode
        if mode not in self._bases:
            replaced = [slot.name for slot in self._binding.layout.dense_slots]
            base = identity_of(self._model, self._tokenizer, mode)
            self._bases[mode] = base.without(replaced)
        return broadcast.announcement.answer(
            self._bases[mode], kind_of(self._outline.config), self._outline.scaling
        )

    def _broadcast(
        self,
        source: str | Path | AdapterState | Tensor,
        round: int | None,
        announced: Announcement | None,
    ) -> BroadcastFolder:
        if isinstance(source, str | Path) and (Path(source) / BROADCAST_FILE).is_file():
            broadcast = read_broadcast(Path(source))
            self._check_announced(broadcast, round)
            return broadcast
        if self._method is None or round is None:
            raise FedcoreError(
                f"source is not a folder with {BROADCAST_FILE}; pass method and round to "
                "FederatedClient"
            )
        if self._method.capabilities.updates_base and round > 0:
            raise FedcoreError(
                f"{self._method.name} updates base weights, and source is an adapter without them; "
                f"pass a folder with {BROADCAST_FILE}"
            )
        if isinstance(source, str | Path):
            adapter = read_adapter(source)
        elif isinstance(source, Tensor):
            layout = self._outline.layout()
            layout.check(source, "source")
            adapter = self._outline.with_row(source, layout)
        else:
            adapter = source
        broadcast = BroadcastFolder(adapter, round, self._method.name, options_of(self._method))
        if announced is None:
            return broadcast
        broadcast = replace(
            broadcast,
            base=announced.base,
            allow=announced.allow,
            total_rounds=announced.total_rounds,
        )
        problem, _ = differences(broadcast.announcement, announced)
        if problem is not None:
            raise FedcoreError(
                f"what was received is not what its message announces: {problem}; leave out "
                "filters that change tensors on their way"
            )
        return broadcast

    def _check_announced(self, broadcast: BroadcastFolder, round: int | None) -> None:
        method = create_method(broadcast.method, **broadcast.options)
        if self._method is not None and self._method != method:
            raise FedcoreError(f"method is {self._method}, the broadcast's is {method}")
        if round is not None and round != broadcast.round:
            raise FedcoreError(f"round is {round}, the broadcast's is {broadcast.round}")

    def _start(self, broadcast: BroadcastFolder, method: Method) -> Tensor:
        """The global row, with the client's own values where the method leaves them to it."""
        private = method.private_layout(broadcast.layout, broadcast.round)
        if not len(private):
            return broadcast.row
        if self._private is None:
            raise FedcoreError(
                f"{method.name} leaves {len(private)} tensors to the client, first "
                f"{private.slots[0].name}; pass private, a folder to keep them in between rounds"
            )
        file = self._private / "private.safetensors"
        if not file.is_file():
            return broadcast.row
        tensors: Mapping[str, Tensor] = read_tensors(file, "private")
        try:
            values = row_from_tensors(tensors, private)
        except FedcoreError as error:
            raise FedcoreError(f"{file}: {error}") from None
        return broadcast.layout.scatter(broadcast.row, private, values)
