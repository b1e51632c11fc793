"""States of a frozen prefix that would not fit are not stored, and the record says why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcore.experiments.observer import Observer
from fedcore.experiments.run import start
from fedcore.experiments.setup import build_experiment
from fedcore.recipes import Recipe
from fedcore.training import prefix as prefix_module
from fedcore.training.free_memory import _available, _left, free_memory
from fedcore.training.prefix import FrozenPrefix
from tests.experiments.jobs import tiny_recipe


def recipe_of(folder: Path, **settings: object) -> Recipe:
    return tiny_recipe(folder, **{"adapter.layers": [-1], "rounds": 1, **settings})


def test_one_byte_too_few_and_the_prefix_is_not_reused(tmp_path: Path) -> None:
    bench = build_experiment(recipe_of(tmp_path), Observer())
    prefix = FrozenPrefix.find(bench.model)
    assert prefix is not None
    assert bench.forward.reuses_prefix
    assert bench.flags == ()
    needed = prefix.nbytes(len(bench.examples), bench.examples.length)
    assert needed == prefix.compute(bench.examples, 8).nbytes
    enough = recipe_of(tmp_path, **{"training.prefix_budget": needed})
    assert build_experiment(enough, Observer()).forward.reuses_prefix
    less = build_experiment(
        recipe_of(tmp_path, **{"training.prefix_budget": needed - 1}), Observer()
    )
    assert not less.forward.reuses_prefix
    assert less.flags == (
        f"the frozen prefix is not reused: its states take {needed} bytes, "
        f"training.prefix_budget is {needed - 1}; it is computed anew in every step",
    )
    with torch.no_grad():
        bench.forward.eval()
        both = (one.forward(torch.arange(4)) for one in (bench, less))
        torch.testing.assert_close(*both)


def test_every_rounds_record_says_so(tmp_path: Path) -> None:
    flags: list[list[str]] = []

    class Seen(Observer):
        def round_finished(self, record: Mapping[str, Any]) -> None:
            flags.append(record["flags"])

    start(recipe_of(tmp_path, **{"training.prefix_budget": 0}), tmp_path / "run", Seen())
    assert len(flags) == 1
    assert "training.prefix_budget is 0" in flags[0][0]


def test_the_default_is_a_quarter_of_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 4000
    monkeypatch.setattr(prefix_module, "free_memory", lambda _: free)
    flags = build_experiment(recipe_of(tmp_path), Observer()).flags
    assert "a quarter of the free memory is 1000" in flags[0]
    monkeypatch.setattr(prefix_module, "free_memory", lambda _: None)
    assert build_experiment(recipe_of(tmp_path), Observer()).flags == ()


def test_free_memory_is_the_machines_within_its_container(tmp_path: Path) -> None:
    free = free_memory(torch.device("cpu"))
    assert free is None or free > 1 << 20
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 9 kB\nMemAvailable:   5 kB\n")
    assert _available(info) == 5 << 10
    assert _available(tmp_path / "none") is None
    (tmp_path / "memory.max").write_text("100\n")
    (tmp_path / "memory.current").write_text("30\n")
    assert _left(tmp_path) == 70
    (tmp_path / "memory.max").write_text("max\n")
    assert _left(tmp_path) is None
