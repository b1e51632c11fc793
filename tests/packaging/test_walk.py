"""The walk of one upload in docs/architecture.md is the one that a round takes."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

from fedcore.data.adapter_state import AdapterState
from fedcore.data.exchange import UploadFolder, write_upload
from fedcore.transports.folders import FileServer

PAGE = Path(__file__).parents[2] / "docs/architecture.md"
KEY = "base_model.model.q.lora_"


def walked() -> list[str]:
    """The functions of the page's table, in its order."""
    section = PAGE.read_text(encoding="utf-8").split("### The walk of one upload")[1]
    return re.findall(r"^\| \d+ \| `([\w.]+)` \|", section.split("\n## ")[0], flags=re.MULTILINE)


def code_of(name: str) -> CodeType:
    """The code of a function, by its dotted name."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            target: Any = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            target = getattr(target, part)
        return target.__code__
    raise AssertionError(name)


def test_a_round_takes_the_walk_of_the_page(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{KEY}A.weight": (2, 8), f"{KEY}B.weight": (6, 2)}
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    start = AdapterState.from_peft(tensors, config, name="start")
    server = FileServer.create(tmp_path / "federation", start, "rolora")
    sent = server.method.upload_layout(server.state.layout, 0)
    upload = UploadFolder(
        row=torch.randn(sent.size, generator=generator),
        round=0,
        examples=3.0,
        frozen=server.served.digest_of(server.method.frozen_layout(server.state.layout, 0)),
        started_from=server.served.identity,
    )
    write_upload(upload, sent, start, tmp_path / "uploads/site", factors=True)

    names = walked()
    by_code = {code_of(name): name for name in names}
    calls: list[str] = []

    def trace(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in by_code:
            calls.append(by_code[frame.f_code])

    sys.setprofile(trace)
    try:
        server.round(tmp_path / "uploads")
    finally:
        sys.setprofile(None)
    assert len(names) <= 12
    assert calls == names
