"""The configuration fields that adapters may have, and what each means to an average.

A field that is not here, or has another value than its rule accepts, is refused by its name
(:mod:`fedcore.data.adapter_kind`). The documentation's table is made of these rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

Use = Literal["any", "read", "same", "union", "dropped", "limited", "refused"]
"""How a field is treated: it does not matter to the tensors; it is read (ranks, scalings, names);
all adapters need the same; differing values are united; it is left out of what is merged; only some
values are accepted; or only the default is."""


@dataclass(frozen=True)
class FieldRule:
    """How one configuration field is treated.

    Attributes:
        use: what is done with a value.
        default: what a missing field stands for; None, False and empty values are equal to it
            where it is one of them.
        why: what the field means to an average, or why a value is refused; a sentence's rest.
        remedy: what a user can do about a refusal.
        accepted: the values of a ``"limited"`` field.
    """

    use: Use
    default: Any
    why: str
    remedy: str = ""
    accepted: tuple[Any, ...] = ()


def _any(why: str, default: Any = None) -> FieldRule:
    return FieldRule("any", default, why)


def _read(why: str, default: Any = None) -> FieldRule:
    return FieldRule("read", default, why)


def _same(why: str, default: Any = None) -> FieldRule:
    return FieldRule("same", default, why)


def _refused(why: str, remedy: str = "train plain LoRA instead", default: Any = None) -> FieldRule:
    return FieldRule("refused", default, why, remedy)


_CONVERT = (
    "convert the adapter first (save_pretrained with path_initial_model_for_weight_conversion)"
)

_SHARED: Mapping[str, FieldRule] = {
    "peft_type": _same("the kind of adapter"),
    "task_type": _any("says which class loads the model; tensors are the same"),
    "auto_mapping": _any("says which class loads the model"),
    "peft_version": _any("names the writer"),
    "base_model_name_or_path": _read("the base model's name; compared by default"),
    "revision": _any("of the base model; its identity is compared by its weights"),
    "inference_mode": _any("whether the adapter trains once loaded", False),
    "r": _read("the rank", 8),
    "lora_alpha": _read("the scaling's numerator", 8),
    "rank_pattern": _read("ranks by module", {}),
    "alpha_pattern": _read("alphas by module", {}),
    "use_rslora": _read("scales by alpha / sqrt(r)", False),
    "target_modules": _read("every adapted module has to be among them, or PEFT drops it"),
    "exclude_modules": _any("leaves modules out; the tensors show which"),
    "layers_to_transform": _any("limits the layers; the tensors show which"),
    "layers_pattern": _any("names the list that layers are counted in"),
    "modules_to_save": _read("modules saved whole; their mean is taken"),
    "fan_in_fan_out": _same("the orientation of the base weight", False),
    "bias": _same("base biases that train, saved whole; their mean is taken", "none"),
}

_LORA: Mapping[str, FieldRule] = {
    **_SHARED,
    "lora_dropout": _any("acts in training alone", 0.0),
    "init_lora_weights": FieldRule(
        "limited",
        True,
        "other starts (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base weights, so that the "
        "file alone is not the adapter",
        _CONVERT,
        (None, True, False, "gaussian", "orthogonal", "eva", "mica"),
    ),
    "use_dora": _same("normalises base weight and update together", False),
    "alora_invocation_tokens": _same("from which token on the adapter acts"),
    "layer_replication": _same("which layers of the base model are copied"),
    "use_qalora": _same("pools the input of A in groups", False),
    "qalora_group_size": _same("the size of these groups", 16),
    "trainable_token_indices": FieldRule(
        "union", None, "rows of embeddings by token; each is the mean of those that train it"
    ),
    "lora_bias": _same("a bias beside B, scaled as the update is", False),
    "target_parameters": _same("adapts parameters, expert by expert; their order is that of keys"),
    "ensure_weight_tying": _same("embedding and head share one adapter", False),
    "megatron_config": _refused("shards the factors over processes", "save a gathered adapter"),
    "megatron_core": _any("only used with megatron_config", "megatron.core"),
    "loftq_config": _refused("LoftQ changes the base weights", _CONVERT, {}),
    "eva_config": _any("draws the start of A; the base weights stay"),
    "corda_config": _refused("CorDA changes the base weights", _CONVERT),
    "lora_ga_config": _refused("LoRA-GA changes the base weights", _CONVERT),
    "velora_config": FieldRule(
        "dropped", None, "compresses activations in training, by vectors that no result needs"
    ),
    "monteclora_config": _refused("samples the factors anew in every forward pass"),
    "runtime_config": _any("where factors live while the model runs"),
    "use_bdlora": _refused("makes one factor block-diagonal, stored as blocks"),
    "arrow_config": _refused("routes between several adapters"),
    "kasa_config": _refused("truncates the base weights and scales each direction of the update"),
}

_ADALORA: Mapping[str, FieldRule] = {
    **{name: rule for name, rule in _LORA.items() if name != "rank_pattern"},
    "rank_pattern": _read("which of the initial directions each module has left"),
    "target_r": _any("the average rank that training ends with", 8),
    "init_r": _read("the rank that the scaling is divided by", 12),
    "tinit": _any("a time of training", 0),
    "tfinal": _any("a time of training", 0),
    "deltaT": _any("a time of training", 1),
    "beta1": _any("smooths a score in training", 0.85),
    "beta2": _any("smooths a score in training", 0.85),
    "orth_reg_weight": _any("a loss term of training", 0.5),
    "total_step": _any("a time of training"),
}

_ADDITIVE: Mapping[str, FieldRule] = {
    **_SHARED,
    "module_shapes": _same("shapes of the adapted weights", {}),
    "init_seed": _any("determines what is drawn at the start", 0),
}

_GRAM: Mapping[str, FieldRule] = {
    **_ADDITIVE,
    "frame": _same("the kind of frame around the factor", "structured"),
    "frame_seed": _same("determines the frames", 0),
    "frame_ids": _same("identities of the frames", {}),
    "offset": _same("whether the initial product is subtracted", True),
    "init_std": _any("the size of the initial factor, which is stored"),
}

_TRI: Mapping[str, FieldRule] = {
    **_ADDITIVE,
    "init": _any("how the factors start; they are stored", "lora"),
    "train_A": _any("whether the factor trains"),
    "train_R": _any("whether the core trains"),
    "train_B": _any("whether the factor trains"),
}

FIELDS: Mapping[str, Mapping[str, FieldRule]] = MappingProxyType(
    {"LORA": _LORA, "ADALORA": _ADALORA, "GRAM": _GRAM, "TRI": _TRI}
)
"""Kind of adapter (``peft_type``) to the fields that its configuration may have."""
