"""How the tuner type of this package becomes one of PEFT's own.

``PeftType`` is a closed enumeration and ``register_peft_method`` refuses names outside of it, so
the enumeration is extended in place first. Both steps are needed: with the string mappings alone,
``save_pretrained`` fails on peft 0.18 with "Unknown PEFT type".
"""

from __future__ import annotations

from typing import Any

from fedcore.errors import FedcoreError, missing_extra

try:
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType, register_peft_method
except ImportError as error:
    raise missing_extra("peft", "peft") from error


def extend_peft_type(name: str) -> PeftType:
    """The member ``name`` of ``PeftType``, added if PEFT does not have it yet.

    Args:
        name: upper case, as PEFT spells its types.

    Raises:
        FedcoreError: this version of PEFT does not let its enumeration grow.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member: Any = str.__new__(PeftType, name)
    try:
        member._name_ = name
        member._value_ = name
        member._sort_order_ = len(PeftType._member_names_)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        # EnumType refuses plain assignment of a member.
        type.__setattr__(PeftType, name, member)
        extended = PeftType(name) is member and PeftType[name] is member and name in list(PeftType)
    except (AttributeError, TypeError, ValueError) as error:
        raise _unsupported(name) from error
    if not extended:
        raise _unsupported(name)
    return member


def register(name: str, config_cls: type[Any], model_cls: type[Any]) -> None:
    """Make ``config_cls`` and ``model_cls`` known to PEFT as the tuner ``name``; idempotent.

    Args:
        name: lower case, without an underscore at the end; state dict keys start with ``name_``.
        config_cls: the ``PeftConfig`` of the tuner.
        model_cls: its ``BaseTuner``.

    Raises:
        FedcoreError: PEFT, or another package, already has a different tuner of that name, or this
            version of PEFT cannot be extended.
    """
    kind = extend_peft_type(name.upper())
    if kind in PEFT_TYPE_TO_TUNER_MAPPING:
        known = (PEFT_TYPE_TO_CONFIG_MAPPING[kind], PEFT_TYPE_TO_TUNER_MAPPING[kind])
        if known == (config_cls, model_cls):
            return
        owner = f"{known[1].__module__}.{known[1].__qualname__}"
        raise FedcoreError(f"PEFT tuner {name!r} is already registered by {owner}")
    register_peft_method(
        name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix
    )


def _unsupported(name: str) -> FedcoreError:
    return FedcoreError(
        f"peft {peft.__version__} does not accept the tuner type {name!r}; use peft >=0.18,<0.22"
    )
