"""What ``fedcore bench server`` measures: whole rounds, against what people run today.

A baseline that takes seconds per module is timed on a few modules and scaled to all of them, which
its row says: its cost per module does not depend on the others.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.case import Plan
from bench.combination import FAMILIES, combination_case
from bench.folders import ADAPTERS, LAYERS, folders_case
from bench.mixing import mixing_case
from bench.rounds import OTHERS, florg_case, product_case
from bench.workloads import Setting
from fedcore.errors import FedcoreError, unknown_name

AGAINST = (*OTHERS, "peft", "adam")
"""What a round can be measured against, besides ``all`` of it."""

DTYPES = (torch.float32, torch.bfloat16)


def parse_against(text: str) -> tuple[str, ...]:
    """Names from :data:`AGAINST` out of ``text``, separated by commas; ``all`` is all of them.

    Raises:
        FedcoreError: an unknown name, or none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in (*AGAINST, "all"):
            raise unknown_name("--against", name, [*AGAINST, "all"])
    if not names:
        raise FedcoreError(f"--against is empty; valid: {', '.join(AGAINST)}, all")
    return AGAINST if "all" in names else tuple(dict.fromkeys(names))


def plans(setting: Setting, against: tuple[str, ...]) -> list[Plan]:
    """FedAvg and FLoRG rounds in fp32 and bf16; with ``peft`` the product round and adapter
    folders, with ``eager`` CE-LoRA's mixing weights, with ``adam`` FLoRA-NA's coefficients.
    """
    device, planned = setting.device, []
    names = [name for name in against if name in OTHERS]
    for workload in setting.rounds:
        for dtype in DTYPES:
            # The published step runs in fp32 only.
            if names and (names != ["published"] or dtype == torch.float32):
                build = partial(florg_case, workload, device, dtype, names)
                planned.append(Plan(f"{workload.name} {str(dtype)[6:]}", build))
    if "peft" in against:
        smaller = setting.rounds[0]
        planned.append(Plan(f"{smaller.name} A and B", partial(product_case, smaller, device)))
        layers = 2 if setting.small else LAYERS
        planned.append(Plan("adapter folders", partial(folders_case, ADAPTERS, layers)))
    if "eager" in against:
        clients = 20 if setting.small else 100
        planned.append(Plan(f"CE-LoRA, {clients} clients", partial(mixing_case, clients)))
    if "adam" in against:
        modules = setting.rounds[0].modules
        for family in FAMILIES:
            build = partial(combination_case, family, modules, device)
            planned.append(Plan(f"FLoRA-NA, {family}", build))
    return planned
