"""One client's round of local training through trl's SFTTrainer, on the one model in memory.

A trainer lives for one round: batches, optimiser and schedule are fedcore's, masks, padding,
accumulation, checkpointing and the fused head are trl's. It leaves nothing behind but what it
trained (:mod:`fedcore.training.trainer_traces`). A new one in every round costs
milliseconds and carries no state from one client to another.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fedcore.errors import FedcoreError
from fedcore.training.layers import eval_mode
from fedcore.training.local_training import LocalResult, LocalSettings
from fedcore.training.optimisers import (
    OptimiserSettings,
    build_optimiser,
    load_optimiser_state,
    optimiser_state,
)
from fedcore.training.round_draws import RoundDraws, row_order
from fedcore.training.schedules import enter_schedule
from fedcore.training.sft_options import SftSettings
from fedcore.training.trainer_traces import model_as_before, process_as_before

COLUMNS = ("input_ids", "labels")
PACKED = "seq_lengths"
"""A column of packed rows, as trl writes it: the lengths of the texts in each."""

# Relative difference of logits in fp32 that reordered sums make, with room to spare.
_SAME = 1e-4


def take_sft_turn(
    model: nn.Module,
    tokenizer: Any,
    rows: datasets.Dataset,
    parameters: Mapping[str, nn.Parameter],
    dense: frozenset[str],
    local: LocalSettings,
    optimiser_settings: OptimiserSettings,
    settings: SftSettings,
    *,
    seed: int,
    client: str,
    round: int = 0,
    rounds: int = 1,
    state: Mapping[str, Tensor] | None = None,
    on_step: Callable[[float], None] | None = None,
) -> LocalResult:
    """Train ``parameters`` of ``model`` on a client's ``rows`` for one round.

    A step's loss is the mean cross-entropy over all targets of its batch, whatever its parts.

    Args:
        model: a causal language model with an adapter, by PEFT, on the device that trains it.
        tokenizer: its tokenizer, with a padding token.
        rows: n rows with ``input_ids``, lists of token ids, and ``labels``, lists of the same
            lengths with -100 where nothing is to be predicted; where they are packed, with
            ``seq_lengths`` as trl's ``pack_dataset`` writes them. Other columns are not read.
        parameters: slot name to parameter; exactly these are stepped.
        dense: names of those that are not factors.
        local: ``autocast`` computes in bf16; the parameters keep their type.
        seed: of the run. Dropout follows from it, ``round`` and ``client``; the order of the rows
            from it and ``client``.
        round, rounds: which round of how many this is, from 0.
        state: the client's optimiser state of an earlier round, to be continued.
        on_step: called with the loss after every step.

    Returns:
        As :func:`~fedcore.training.local_training.train_client`.

    Raises:
        FedcoreError: rows without these columns, no padding token, a batch that has no such parts,
            an adapter on the head, several visible cards, a model that mixes up packed rows, or an
            option of trl with a value that it refuses. Nothing has changed then.
    """
    part = settings.part(local)
    device = next(iter(parameters.values())).device
    _check(model, tokenizer, rows, settings, device)
    keep = optimiser_settings.state == "keep"
    steps = local.count_steps(len(rows))
    if not steps:
        return LocalResult(float("nan"), 0, dict(state or {}) if keep else {})
    if settings.packs:
        check_packing(model)
    # Fewer rows than a batch: each once, as far as the parts allow it.
    part = max(1, min(part, len(rows) // settings.accumulation))
    batch = part * settings.accumulation
    order = row_order(len(rows), batch * steps, batch * steps * round, seed=seed, client=client)
    small = RoundDraws(seed, client, round).trainer_seed
    recorder = _Recorder(parameters, state if keep and state else {}, on_step)
    with (
        process_as_before(device),
        model_as_before(model),
        tempfile.TemporaryDirectory() as nowhere,
    ):
        trained = {id(parameter) for parameter in parameters.values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        optimiser = build_optimiser(parameters, dense, optimiser_settings)
        schedule, rate = optimiser_settings.schedule, optimiser_settings.rate
        scheduler = enter_schedule(
            optimiser, schedule, rate=rate, round=round, rounds=rounds, steps=steps
        )
        arguments = _arguments(nowhere, local, settings, device, part, steps, small)
        data = _columns(rows).select(order.tolist())
        try:
            trainer = _Trainer(
                model,
                arguments,
                train_dataset=data,
                processing_class=tokenizer,
                optimizers=(optimiser, scheduler),
                callbacks=[recorder],
                recorder=recorder,
            )
        except ValueError as error:
            raise FedcoreError(f"trl refuses the model or the options of [sft]: {error}") from error
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        after = optimiser_state(optimiser, parameters, state) if keep else {}
    return LocalResult(sum(recorder.losses) / steps, len(recorder.losses), after)


def pack_rows(rows: datasets.Dataset, settings: SftSettings, max_length: int) -> datasets.Dataset:
    """``rows``, where ``settings`` pack them, several in a sequence of ``max_length`` tokens.

    Raises:
        FedcoreError: ``max_length`` does not fit trl's packing.
    """
    if not settings.options.get("packing"):
        return rows
    strategy = settings.options.get("packing_strategy", "bfd")
    with process_as_before(torch.device("cpu")):
        try:
            return pack_dataset(rows, max_length, strategy)
        except ValueError as error:
            raise FedcoreError(f"trl refuses to pack the rows: {error}") from error


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Whether texts that share a sequence are computed as they are alone.

    Two texts of random tokens are run packed and separately, in eval mode.

    Raises:
        FedcoreError: their logits differ by more than 1e-4 of their norm, or by more than the
            precision of the model's weights explains.
    """
    weights: Any = model.get_input_embeddings().weight  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(weights.shape[0], (n,), generator=generator).tolist() for n in (9, 13)]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    packed = collate([{"input_ids": text} for text in texts])
    del packed["labels"]
    with eval_mode(model):
        together = _logits(model, packed)[0]
        alone = torch.cat([_logits(model, {"input_ids": torch.tensor([t])})[0] for t in texts])
    difference = float((together - alone).norm() / alone.norm())
    precision = 2 * torch.finfo(weights.dtype).eps if weights.is_floating_point() else 0.0
    if not difference <= max(_SAME, precision):
        base: Any = getattr(model, "get_base_model", lambda: model)()
        raise FedcoreError(
            f"{type(base).__name__} mixes up rows that share a sequence (its logits differ by "
            f"{difference:.1e} of their norm); leave out sft.packing and sft.padding_free"
        )


class _Recorder(TrainerCallback):
    """Losses of a round's steps; and the optimiser's state is put in once accelerate is done."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        state: Mapping[str, Tensor],
        on_step: Callable[[float], None] | None,
    ) -> None:
        self.parts: list[Tensor] = []
        self.losses: list[float] = []
        self._parameters, self._state, self._on_step = parameters, state, on_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        # accelerate moves all of an optimiser's state to the card, step counts too, which torch
        # refuses there.
        inner = getattr(rest["optimizer"], "optimizer", rest["optimizer"])
        load_optimiser_state(inner, self._parameters, self._state)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.losses.append(float(torch.stack(self.parts).sum()))
        self.parts.clear()
        if self._on_step is not None:
            self._on_step(self.losses[-1])


class _Trainer(SFTTrainer):
    def __init__(self, model: Any, *args: Any, recorder: _Recorder, **named: Any) -> None:
        self._recorder = recorder
        # trl makes bf16 of what trains on a 4- or 8-bit base, which would round the broadcast.
        broadcast = [(p, p.data) for p in model.parameters() if p.requires_grad]
        try:
            super().__init__(model, *args, **named)
        finally:
            for parameter, values in broadcast:
                parameter.data = values

    def _send_telemetry(self) -> None:
        """trl reports every construction to the hub; a client reports to its server alone."""

    def training_step(self, *args: Any, **named: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **named)
        self._recorder.parts.append(loss.detach())
        return loss


def _arguments(
    folder: str,
    local: LocalSettings,
    settings: SftSettings,
    device: torch.device,
    part: int,
    steps: int,
    seed: int,
) -> SFTConfig:
    options = {
        "router_aux_loss_coef": 0.0,
        "dataloader_pin_memory": device.type == "cuda",
        "train_sampling_strategy": "sequential",
        **settings.options,
    }
    try:
        return SFTConfig(
            folder,
            seed=seed,
            data_seed=seed,
            max_steps=steps,
            per_device_train_batch_size=part,
            gradient_accumulation_steps=settings.accumulation,
            max_grad_norm=local.clip_norm or 0.0,
            bf16=local.autocast,
            fp16=False,
            use_cpu=device.type == "cpu",
            gradient_checkpointing=settings.checkpointing,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            **options,
        )
    except (TypeError, ValueError) as error:
        raise FedcoreError(f"trl refuses the options of [sft]: {error}") from error


def _check(
    model: nn.Module,
    tokenizer: Any,
    rows: datasets.Dataset,
    settings: SftSettings,
    device: torch.device,
) -> None:
    missing = [column for column in COLUMNS if column not in rows.column_names]
    if missing:
        raise FedcoreError(
            f"the rows have no column {missing[0]!r}, only {', '.join(rows.column_names)}; pass "
            "tokenised rows with input_ids and labels"
        )
    if settings.packs and settings.options.get("packing") and PACKED not in rows.column_names:
        raise FedcoreError(
            f"sft.packing is set, and the rows have no column {PACKED!r}; pack them by "
            "trl.pack_dataset, or leave sft.packing out"
        )
    if getattr(tokenizer, "pad_token", None) is None:
        raise FedcoreError("the tokenizer has no padding token; set tokenizer.pad_token")
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, BaseTunerLayer):
        raise FedcoreError(
            "the model's head has an adapter, which trl's loss does not see; leave lm_head out of "
            "adapter.target_modules"
        )
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if device.type == "cuda" and torch.cuda.device_count() > 1 and not distributed:
        raise FedcoreError(
            f"this process sees {torch.cuda.device_count()} cards, and a client trains on one; "
            "start it with CUDA_VISIBLE_DEVICES set to that card"
        )


def _columns(rows: datasets.Dataset) -> datasets.Dataset:
    return rows.select_columns([c for c in (*COLUMNS, PACKED) if c in rows.column_names])


def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    device = next(model.parameters()).device
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    logits: Tensor = model(**moved, use_cache=False).logits
    return logits.float()
