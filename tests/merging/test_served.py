"""Every merged folder of LoRA adapters is one that vLLM and llama.cpp scale rightly."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcore import aggregate
from fedcore.merging import methods_for_merging
from fedcore.methods import create_method
from tests.property.folders import lora_folder
from tests.reference.served import problems

KINDS = {
    "equal": ({}, {}),
    "ranks": ({}, {"ranks": {"block.0.q": 2}, "alpha_pattern": {r"block\.0\.q": 4}}),
    "rslora": ({"use_rslora": True}, {"rank": 5}),
}


CASES = [
    (method.name, kind)
    for method in methods_for_merging("lora")
    for kind in KINDS
    # FFA's common factor has one rank.
    if kind == "equal"
    or (create_method(method.name).capabilities.mixed_ranks and method.name != "ffa")
]


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_a_merged_folder_is_scaled_rightly(method: str, kind: str, tmp_path: Path) -> None:
    usual, other = KINDS[kind]
    folders = [
        lora_folder(tmp_path / f"{n}", n, common_a=method == "ffa", **options)
        for n, options in enumerate([usual, usual, other, usual, usual])
    ]
    aggregate(folders, method=method, out=tmp_path / "out", compare=False)
    assert problems(tmp_path / "out") == []
