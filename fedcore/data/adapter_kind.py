"""What an adapter may be: the one allow-list, by kind, configuration field and tensor.

Everything that takes an adapter asks here first, before it looks at shapes or values: a kind, a
field of another value than its default, or a tensor that is not listed is refused by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from fedcore.data.adapter_fields import FIELDS
from fedcore.data.peft_keys import (
    LORA_BIAS,
    MAGNITUDE,
    TAGS,
    TOKEN_ROWS,
    TRAINING_ONLY,
    ends_with,
    parse_key,
)
from fedcore.errors import FedcoreError

EMBEDDINGS = ("embed_tokens", "lm_head")
"""Modules of which PEFT writes the frozen base weights beside an adapter on embeddings."""

_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT saves whole for a task, whether the configuration lists them or not."""

_FOREIGN_TAGS = (
    "ada_",
    "boft_",
    "c3a_",
    "fourierft_",
    "gralora_",
    "hada_",
    "hira_",
    "hra_",
    "ia3_",
    "ln_tuning_",
    "lokr_",
    "lora_",
    "miss_",
    "oft_",
    "poly_",
    "prompt_",
    "randlora_",
    "road_",
    "shira_",
    "trainable_tokens_",
    "vblora_",
    "vera_",
    "waveft_",
    "xlora_",
)
"""How names of parameters begin that belong to an adapter and never to a head."""


def _plain(value: Any) -> Any:
    """``value`` as JSON has it: enums by their value, sequences as lists, sets in order."""
    value = getattr(value, "value", value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _is_default(value: Any, default: Any) -> bool:
    plain, expected = _plain(value), _plain(default)
    if expected is None or expected is False or expected in ({}, []):
        return plain is None or plain is False or plain in ({}, [], "")
    same_type = isinstance(plain, bool) == isinstance(expected, bool)
    return plain is None or (plain == expected and same_type)


def kind(config: Mapping[str, Any]) -> str:
    """The kind of adapter that ``config`` describes; without ``peft_type`` it is plain LoRA."""
    return str(_plain(config.get("peft_type")) or "LORA").upper()


def config_problem(config: Mapping[str, Any]) -> str | None:
    """The first thing in ``config`` that is not on the list, and what to do about it."""
    name = kind(config)
    rules = FIELDS.get(name)
    if rules is None:
        return (
            f"peft_type is {name!r:.40}, whose tensors cannot be averaged here; accepted are "
            f"{', '.join(FIELDS)}: train one of them"
        )
    for field, value in config.items():
        rule = rules.get(field)
        if rule is None:
            if not _is_default(value, None):
                return (
                    f"its configuration has {field!r:.60}, which is not known; update fedcore, or "
                    "remove the field if it does not change what the tensors mean"
                )
        elif rule.use == "refused" and not _is_default(value, rule.default):
            return f"{field} is set, which is not supported: {rule.why}; {rule.remedy}"
        elif rule.use == "limited" and not _one_of(value, rule.accepted):
            return f"{field} is {value!r:.60}: {rule.why}; {rule.remedy}"
    return _form_problem(config) or _combination_problem(config)


def _one_of(value: Any, accepted: tuple[Any, ...]) -> bool:
    return any(value is one or (isinstance(one, str) and value == one) for one in accepted)


def _form_problem(config: Mapping[str, Any]) -> str | None:
    """A field that is read here, in another form than PEFT writes it."""
    for field in ("target_modules", "modules_to_save", "target_parameters"):
        value = config.get(field)
        if value is None or (isinstance(value, str) and field == "target_modules"):
            continue
        listed = isinstance(value, list | tuple | set | frozenset)
        if not listed or not all(isinstance(name, str) for name in value):
            return f"{field} is {value!r:.60}; a list of names is needed"
    for field in ("task_type", "bias", "base_model_name_or_path"):
        value = _plain(config.get(field))
        if value is not None and not isinstance(value, str):
            return f"{field} is {value!r:.60}; a name is needed"
    return None


def _combination_problem(config: Mapping[str, Any]) -> str | None:
    if config.get("target_parameters") and (
        config.get("rank_pattern") or config.get("alpha_pattern")
    ):
        return (
            "target_parameters beside rank_pattern or alpha_pattern: which parameter a pattern "
            "means is not written down; train with one rank"
        )
    return None


def meaning_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that give tensors their meaning, as JSON, at values other than the default.

    Equal for two adapters whose tensors mean the same. Without scalings, ranks and token indices,
    which differ between adapters that can be averaged.
    """
    rules = FIELDS[kind(config)]
    meaning = {
        field: _plain(config[field])
        for field, rule in rules.items()
        if rule.use == "same" and field in config and not _is_default(config[field], rule.default)
    }
    if not meaning.get("use_qalora"):
        meaning.pop("qalora_group_size", None)
    return {**meaning, "peft_type": kind(config)}


def kind_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What clients of a round have in common with the server, as JSON: :func:`meaning_of` and the
    tokens whose rows are trained, in their order; empty where the configuration names no kind.
    """
    if config.get("peft_type") is None:
        return {}
    tokens = _plain(config.get("trainable_token_indices"))
    return {**meaning_of(config), **({"trainable_token_indices": tokens} if tokens else {})}


def meaning_problem(config: Mapping[str, Any], other: Mapping[str, Any], whose: str) -> str | None:
    """The first field by which the tensors of two adapters mean something else, if any.

    Args:
        whose: the other adapter, in an error.
    """
    one, two = meaning_of(config), meaning_of(other)
    for field in ["peft_type", *one, *(name for name in two if name not in one)]:
        if one.get(field) != two.get(field):
            mine, theirs = (
                meaning.get(field, FIELDS[meaning["peft_type"]][field].default)
                for meaning in (one, two)
            )
            return f"{field} is {mine!r:.60}, that of {whose} is {theirs!r:.60}"
    return None


def not_additive(config: Mapping[str, Any], tensors: Iterable[str] = ()) -> str | None:
    """Why a second adapter beside one of ``config`` does not add to it, if it does not.

    Args:
        tensors: names of the adapter's tensors, which show DoRA where no configuration does.
    """
    names = list(tensors)
    if config.get("use_dora") or any(MAGNITUDE in name.split(".") for name in names):
        return "DoRA normalises base weight and update together, so that a second one does not add"
    if config.get("alora_invocation_tokens"):
        return "aLoRA acts from its invocation tokens on, and a second one on every token"
    return None


Tensors = Literal["factor", "constant", "singular", "dense", "frozen", "unused"]
"""What a tensor of a file is to an average: ``"frozen"`` is a copy of a base weight, ``"unused"``
is of no use outside the training that wrote it."""


def role_of(key: str, config: Mapping[str, Any] | None) -> Tensors:
    """What the tensor ``key`` of an adapter is.

    Args:
        config: the adapter's configuration; None where it is not known, and every name that no
            adapter gives its parameters is that of a head or norm.

    Raises:
        FedcoreError: naming the tensor: an adapter of this configuration has none of its name.
    """
    meaning = parse_key(key)
    path = meaning.module
    if meaning.role == "singular":
        if config is None or kind(config) != "ADALORA":
            raise FedcoreError(f"{key} is of AdaLoRA, and peft_type is not ADALORA")
        return "singular"
    if meaning.role != "dense":
        return meaning.role
    for end, field in FIELD_OF_TENSOR:
        if ends_with(path, end):
            if config is not None and not config.get(field):
                raise FedcoreError(
                    f"{key} belongs to {field}, which its configuration does not set"
                )
            return "dense"
    if TRAINING_ONLY in path.split(".")[-2:] and config is not None and config.get("velora_config"):
        return "unused"
    # Checked by the path's own components: a head may be called anything else.
    parts = path.split(".")
    if any(part.startswith(_FOREIGN_TAGS) for part in parts[-3:]) or TAGS & {*parts}:
        raise FedcoreError(
            f"{key} is a parameter of an adapter that is not known; accepted are low-rank factors, "
            "DoRA magnitudes, biases, token rows, and modules saved whole"
        )
    wrapped = path.endswith(".base_layer.weight")
    copied = is_embedding_copy(path) and config is not None and not _saved_whole(path, config)
    if copied or (wrapped and config is None):
        return "frozen"
    # PEFT always writes the field; a configuration without it was made by hand.
    if config is None or "modules_to_save" not in config or _saved_whole(path, config):
        return "dense"
    raise FedcoreError(
        f"{key} is neither a factor nor of a module in modules_to_save; list its module there, or "
        "leave the tensor out"
    )


FIELD_OF_TENSOR = (
    (MAGNITUDE, "use_dora"),
    (LORA_BIAS, "lora_bias"),
    (TOKEN_ROWS, "trainable_token_indices"),
)
"""Ends of the names of dense tensors that belong to adapters, and the field that asks for each."""


def _saved_whole(path: str, config: Mapping[str, Any]) -> bool:
    """Whether the tensor is of a module in ``modules_to_save``, or a bias that trains."""
    if path.rpartition(".")[2] == "bias" and (config.get("bias") or "none") != "none":
        return True
    saved = config.get("modules_to_save") or ()
    names = [*saved]
    if config.get("ensure_weight_tying") and set(names) & set(EMBEDDINGS):
        names += EMBEDDINGS
    names += _HEADS.get(str(_plain(config.get("task_type"))), ())
    parts = path.split(".")
    modules = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    # As PEFT finds them: by the end of the module's path.
    return any(module.endswith(str(name)) for module in modules for name in names)


def is_embedding_copy(path: str) -> bool:
    """Whether PEFT writes this frozen base weight beside an adapter on embeddings."""
    module, _, name = path.rpartition(".")
    wrapped = module.removesuffix(".base_layer")
    return name == "weight" and wrapped.rpartition(".")[2] in EMBEDDINGS


def token_indices(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The tokens of the rows ``name``, in order.

    Raises:
        FedcoreError: the configuration lists none for it, or one twice.
    """
    listed = config.get("trainable_token_indices")
    module = name.removesuffix(f".{TOKEN_ROWS}")
    if isinstance(listed, Mapping):
        listed = next((v for key, v in listed.items() if ends_with(module, str(key))), None)
    if not isinstance(listed, list | tuple) or not all(type(i) is int and i >= 0 for i in listed):
        raise FedcoreError(f"trainable_token_indices lists no tokens of {module}")
    if len(set(listed)) < len(listed):
        raise FedcoreError(f"trainable_token_indices lists a token of {module} twice")
    return tuple(listed)
