"""Overwriting an adapter deletes nothing that an aggregation did not write."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcore import FedcoreError, aggregate
from tests.property.folders import lora_folder
from tests.reference.merged import stored_tensors


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [lora_folder(tmp_path / name, n) for n, name in enumerate("ab")]


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def put(name: str) -> Callable[[Path], object]:
    def file(out: Path) -> None:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")

    return file


FOREIGN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "PEFT's own page": ("README.md", put("README.md")),
    "a tokenizer": ("tokenizer.json", put("tokenizer.json")),
    "a Trainer's checkpoint": ("checkpoint-500/optimizer.pt", put("checkpoint-500/optimizer.pt")),
    "a hidden file": (".gitattributes", put(".gitattributes")),
    "a file beside the residual": ("residual/notes.txt", put("residual/notes.txt")),
    "a shard": ("adapter_model-2.safetensors", put("adapter_model-2.safetensors")),
    "pickled weights": ("adapter_model.bin", put("adapter_model.bin")),
    "another letter case": ("Adapter_Config.json", put("Adapter_Config.json")),
    "a file that only looks left over": (".mine.new", put(".mine.new")),
    "an empty folder": ("checkpoint-1", lambda out: (out / "checkpoint-1").mkdir()),
    "a link to a folder": ("data", lambda out: (out / "data").symlink_to(out.parent / "a")),
    "a link to nothing": ("gone", lambda out: (out / "gone").symlink_to("nowhere")),
}


@pytest.mark.parametrize("what", list(FOREIGN))
def test_a_folder_with_anything_else_is_refused_by_its_name(
    what: str, folders: list[Path], tmp_path: Path
) -> None:
    name, make = FOREIGN[what]
    out = tmp_path / "out"
    aggregate(folders, method="fedex", out=out)
    make(out)
    before = content(out)
    with pytest.raises(FedcoreError) as caught:
        aggregate(folders, method="fedit", out=out, overwrite=True)
    assert f"which holds {name!r}" in str(caught.value)
    assert "README.md of PEFT too, or pass another folder" in str(caught.value)
    assert content(out) == before
    assert os.path.lexists(out / name)


def test_the_number_of_other_files_is_said(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    aggregate(folders, out=out)
    for name in ("a.txt", "b.txt", "c/d.txt"):
        put(name)(out)
    with pytest.raises(FedcoreError, match=r"which holds 'a.txt' and 2 others: "):
        aggregate(folders, out=out, overwrite=True)


def test_a_file_that_comes_while_it_is_computed_stays(folders: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    aggregate(folders, method="fedit", out=out)
    before = content(out)
    with pytest.raises(FedcoreError, match=r"which holds 'notes.txt'"):
        aggregate(
            folders,
            method="fedex",
            out=out,
            overwrite=True,
            progress=lambda done, total: put("notes.txt")(out),
        )
    assert content(out) == {**before, "notes.txt": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


def test_what_killed_processes_left_is_neither_foreign_nor_kept(
    folders: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    aggregate(folders, method="fedex", out=out)
    put(".adapter_config.json.0123abcd.tmp/new/adapter_config.json")(out)
    put(".out.0123abcd.new/new/adapter_config.json")(tmp_path)
    put(".out.4242.tmp/file")(tmp_path)
    aggregate(folders, method="fedit", out=out, overwrite=True)
    assert sorted(content(out)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


def test_threads_that_overwrite_one_folder_all_succeed(tmp_path: Path) -> None:
    inputs = [lora_folder(tmp_path / "in" / str(n), n) for n in range(4)]
    out, errors = tmp_path / "out", []
    aggregate(inputs[:1], method="fedit", out=out, compare=False)

    def overwrite(n: int) -> None:
        for turn in range(4):
            try:
                aggregate(
                    [inputs[(n + turn) % 4]],
                    method=("fedit", "fedex")[turn % 2],
                    out=out,
                    overwrite=True,
                    compare=False,
                )
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=overwrite, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert stored_tensors(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
