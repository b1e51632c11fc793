"""What a recipe says of local training by trl: fedcore's own settings, and options passed through.

Each field of trl's ``SFTConfig`` is in one of two lists: fedcore sets it, and ``[sft]`` refuses it
by the name of what to use instead, or ``[sft]`` hands it through as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedcore.checks import choice, count, flag
from fedcore.errors import FedcoreError, unknown_name
from fedcore.training.local_training import LocalSettings

_RUN_FOLDER = "leave it out: the run folder holds what a run writes"
_RECORD = "leave it out: every round's record holds the losses"
_EVALUATION = "use the keys of [evaluation]"
_HUB = "leave it out, and export the run's adapter"
_TEMPLATE = "set it in the tokenizer of model.source"
_RATE = "use optimiser.schedule"
_OPTIMISER = "use the keys of [optimiser]"
_LAUNCHER = "leave it out: a client is one process on one device"
_CHECKPOINTING = "use training.checkpointing, and sft.gradient_checkpointing_kwargs for its details"
_ROWS = "use the keys of [data]; fedcore prepares the rows"
_PRECISION = "use training.precision"
_COMPILE = "leave it out: compiling would begin anew in every round"

OWNED: Mapping[str, str] = {
    # What a client trains, and for how long.
    "seed": "use seed",
    "data_seed": "use seed",
    "max_steps": "use training.steps",
    "num_train_epochs": "use training.epochs",
    "per_device_train_batch_size": "use training.batch_size",
    "gradient_accumulation_steps": "use training.accumulation",
    "auto_find_batch_size": "use training.batch_size",
    "average_tokens_across_devices": "leave it out: a step's loss is the mean over its targets",
    "max_grad_norm": "use training.clip_norm",
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "bf16_full_eval": _PRECISION,
    "fp16_full_eval": _PRECISION,
    "use_cpu": "use training.device",
    "gradient_checkpointing": "use training.checkpointing",
    "activation_checkpointing": _CHECKPOINTING,
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "full_determinism": "leave it out: it changes settings of the whole process",
    "neftune_noise_alpha": "leave it out: its hook would stay in the model",
    "use_cache": "leave it out: training has no use for a key-value cache",
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "use_liger_kernel": "leave it out: it exchanges functions of transformers in the whole process",
    "liger_kernel_config": "leave it out: it exchanges functions of transformers",
    # Optimiser and schedule.
    "learning_rate": "use optimiser.rate",
    "lr_scheduler_type": _RATE,
    "lr_scheduler_kwargs": "use optimiser.schedule_options",
    "warmup_steps": "use optimiser.warmup_rounds",
    "optim": "use optimiser.name",
    "optim_args": _OPTIMISER,
    "optim_target_modules": _OPTIMISER,
    "weight_decay": "use optimiser.weight_decay",
    "adam_beta1": "use optimiser.beta1",
    "adam_beta2": "use optimiser.beta2",
    "adam_epsilon": _OPTIMISER,
    # Rows.
    "max_length": "use model.max_length",
    "truncation_mode": "use data.overlong",
    "completion_only_loss": "use data.loss",
    "assistant_only_loss": "use data.loss",
    "dataset_text_field": "use data.format",
    "dataset_kwargs": _ROWS,
    "dataset_num_proc": _ROWS,
    "shuffle_dataset": "leave it out: the order of a client's rows follows from seed",
    "remove_unused_columns": _ROWS,
    "label_names": _ROWS,
    "length_column_name": _ROWS,
    "dataloader_drop_last": "leave it out: every batch is full",
    "dataloader_in_order": "leave it out: the order of a client's rows follows from seed",
    "chat_template_path": _TEMPLATE,
    "eos_token": _TEMPLATE,
    "pad_token": _TEMPLATE,
    # Model and devices.
    "model_init_kwargs": "use the keys of [model]",
    "trust_remote_code": "leave it out: code of a checkpoint is never run",
    "accelerator_config": _LAUNCHER,
    "parallelism_config": _LAUNCHER,
    "ddp_find_unused_parameters": _LAUNCHER,
    "ddp_bucket_cap_mb": _LAUNCHER,
    "ddp_broadcast_buffers": _LAUNCHER,
    "ddp_static_graph": _LAUNCHER,
    "ddp_backend": _LAUNCHER,
    "ddp_timeout": _LAUNCHER,
    "fsdp": _LAUNCHER,
    "fsdp_config": _LAUNCHER,
    "deepspeed": _LAUNCHER,
    "local_rank": _LAUNCHER,
    # Files, logs, evaluation, hub.
    "output_dir": _RUN_FOLDER,
    "save_strategy": _RUN_FOLDER,
    "save_steps": _RUN_FOLDER,
    "save_total_limit": _RUN_FOLDER,
    "save_only_model": _RUN_FOLDER,
    "save_on_each_node": _RUN_FOLDER,
    "enable_jit_checkpoint": _RUN_FOLDER,
    "resume_from_checkpoint": "leave it out, and resume the run",
    "ignore_data_skip": "leave it out, and resume the run",
    "restore_callback_states_from_checkpoint": "leave it out, and resume the run",
    "load_best_model_at_end": _EVALUATION,
    "metric_for_best_model": _EVALUATION,
    "greater_is_better": _EVALUATION,
    "do_train": _EVALUATION,
    "do_eval": _EVALUATION,
    "do_predict": _EVALUATION,
    "eval_strategy": _EVALUATION,
    "eval_steps": _EVALUATION,
    "eval_delay": _EVALUATION,
    "eval_on_start": _EVALUATION,
    "eval_packing": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "per_device_eval_batch_size": "use evaluation.batch_size",
    "prediction_loss_only": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "report_to": "leave it out: a client reports to its server alone",
    "run_name": _RECORD,
    "project": _RECORD,
    "trackio_space_id": _RECORD,
    "trackio_bucket_id": _RECORD,
    "trackio_static_space_id": _RECORD,
    "logging_strategy": _RECORD,
    "logging_steps": _RECORD,
    "logging_first_step": _RECORD,
    "log_on_each_node": _RECORD,
    "logging_nan_inf_filter": _RECORD,
    "include_num_input_tokens_seen": _RECORD,
    "log_level": _RECORD,
    "log_level_replica": _RECORD,
    "disable_tqdm": _RECORD,
    "skip_memory_metrics": _RECORD,
    "debug": _RECORD,
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
}
"""Field of ``SFTConfig`` that fedcore sets to what to use instead."""

PASSED = frozenset(
    {
        "packing",
        "packing_strategy",
        "padding_free",
        "pad_to_multiple_of",
        "loss_type",
        "label_smoothing_factor",
        "router_aux_loss_coef",
        "gradient_checkpointing_kwargs",
        "activation_offloading",
        "tf32",
        "torch_empty_cache_steps",
        "train_sampling_strategy",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
    }
)
"""Fields of ``SFTConfig`` that ``[sft]`` may set."""

_CHOICES = {
    # trl takes any other word for its default.
    "packing_strategy": ("bfd", "bfd_split", "wrapped"),
    "train_sampling_strategy": ("sequential", "random", "group_by_length"),
}


@dataclass(frozen=True)
class SftSettings:
    """How a client's round through trl uses its device, beside what every task has.

    Attributes:
        accumulation: parts that a batch is worked on in, one after the other; they divide it.
        checkpointing: compute activations twice instead of keeping them; no bit changes.
        options: fields of ``SFTConfig`` that are passed through, by the names in :data:`PASSED`.

    Raises:
        FedcoreError: a field that fedcore sets or that is unknown, or a value out of range.
    """

    accumulation: int = 1
    checkpointing: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count("", "accumulation", self.accumulation, least=1)
        flag("", "checkpointing", self.checkpointing)
        for name in self.options:
            if name in OWNED:
                raise FedcoreError(f"sft.{name} is set by fedcore; {OWNED[name]}")
            if name not in PASSED:
                raise unknown_name("recipe key", f"sft.{name}", [f"sft.{key}" for key in PASSED])
            if name in _CHOICES:
                choice("", f"sft.{name}", self.options[name], _CHOICES[name])
        if self.options.get("gradient_checkpointing_kwargs") and not self.checkpointing:
            raise FedcoreError(
                "sft.gradient_checkpointing_kwargs is set and training.checkpointing is not; "
                "pass training.checkpointing = true"
            )

    @property
    def packs(self) -> bool:
        """Whether several rows share one sequence, kept apart by their positions alone."""
        strategy = self.options.get("packing_strategy", "bfd")
        packed = bool(self.options.get("packing")) and strategy != "wrapped"
        return packed or bool(self.options.get("padding_free"))

    def part(self, local: LocalSettings) -> int:
        """Rows that are worked on at a time.

        Raises:
            FedcoreError: the batch has no such parts.
        """
        if local.batch_size % self.accumulation:
            raise FedcoreError(
                f"training.batch_size is {local.batch_size}, and training.accumulation is "
                f"{self.accumulation}; pass one that divides it"
            )
        return local.batch_size // self.accumulation
