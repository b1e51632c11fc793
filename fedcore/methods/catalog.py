"""Every method by name: one place to look one up, list them, or build one with its options."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fedcore.checks import flag
from fedcore.errors import unknown_name
from fedcore.methods.base import Method
from fedcore.methods.baselines import Centralised, HeadOnly, LocalOnly
from fedcore.methods.gram.florg import FlorgAvgA, FlorgSketched, FlorgTruncated
from fedcore.methods.gram.florg_whitened import FlorgWhitened
from fedcore.methods.lora.fedex import FedEx
from fedcore.methods.lora.fedit import FedIT
from fedcore.methods.lora.fedrot import FedRot
from fedcore.methods.lora.fedsa import FedSA
from fedcore.methods.lora.ffa import FFA
from fedcore.methods.lora.flora import Flora
from fedcore.methods.lora.flora_na.method import FloraNA
from fedcore.methods.lora.florist import Florist
from fedcore.methods.lora.lora_fair import LoRAFair
from fedcore.methods.lora.product_svd import ProductSvd
from fedcore.methods.lora.rolora import RoLoRA
from fedcore.methods.robust.rules import RobustClip, RobustGeomedian, RobustKrum, RobustMedian
from fedcore.methods.tri.ce_lora.method import CELoRA
from fedcore.methods.tri.ce_lora.projected import CELoRAProjected
from fedcore.methods.tri.fed_sb import FedSB

METHODS: tuple[type[Method], ...] = (
    FedIT,
    FFA,
    RoLoRA,
    FedSA,
    FlorgTruncated,
    FlorgSketched,
    FlorgWhitened,
    FlorgAvgA,
    ProductSvd,
    Flora,
    FedEx,
    Florist,
    LoRAFair,
    FedRot,
    FloraNA,
    CELoRA,
    CELoRAProjected,
    FedSB,
    RobustClip,
    RobustKrum,
    RobustMedian,
    RobustGeomedian,
    HeadOnly,
    LocalOnly,
    Centralised,
)
"""All methods, in the order in which tables show them."""


def find_method(name: str) -> type[Method]:
    """The class of a method, by its name or one of its aliases.

    Raises:
        FedcoreError: one line with the nearest valid names.
    """
    for method in METHODS:
        if name == method.name or name in method.aliases:
            return method
    known = [known for method in METHODS for known in (method.name, *method.aliases)]
    raise unknown_name("method", name, known)


def create_method(name: str, **options: Any) -> Method:
    """A method with its hyper-parameters.

    Raises:
        FedcoreError: unknown name or option, or an option of the wrong type.

    Example:
        >>> create_method("florg", align=False)
        FlorgTruncated(align=False)
    """
    method = find_method(name)
    # Every subclass is a dataclass; the abstract base is not.
    known = {option.name: option.type for option in fields(method)}  # type: ignore[arg-type]
    for option, value in options.items():
        if option not in known:
            raise unknown_name(f"option of method {method.name}", option, known)
        if known[option] == "bool":
            flag(method.name, option, value)
    return method(**options)


def options_of(method: Method) -> dict[str, Any]:
    """The hyper-parameters by name: ``create_method(method.name, **options_of(method))`` is it."""
    return {option.name: getattr(method, option.name) for option in fields(method)}  # type: ignore[arg-type]


def describe_methods() -> list[dict[str, Any]]:
    """One flat record a method: name, aliases, source, traits and traffic."""
    return [
        {
            "name": method.name,
            "aliases": ", ".join(method.aliases),
            "summary": method.summary,
            "paper": method.paper,
            "adapter": method.family,
            **{field.name: getattr(method.traits, field.name) for field in fields(method.traits)},
        }
        for method in METHODS
    ]
