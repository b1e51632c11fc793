"""Seeded damage to a PEFT adapter folder: bytes, headers, configurations, files."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

_ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 4, 8, 2**31, 2**63, 10**40, 0.5, 1e-320, 1e308, "3", "", [],
    [1], {}, {"q": 2}, {"q": "2"}, {"(": 2}, {"(a+)+": 2}, {".*": -1}, {"block.0.q": 3},
    float("nan"), float("inf"), -float("inf"), "NaN", "pissa", ["q"], ["q", "v"], "q|v", "\ud800",
)  # fmt: skip

_ODD_DTYPES = (
    "F64", "F32", "F16", "BF16", "I8", "I64", "U8", "BOOL", "F8_E4M3", "C64", "f32", "", None, 4,
    [],
)  # fmt: skip

_ODD_NUMBERS = (-1, 0, 1, 2, 3, 7, 2**31, 2**62, 2**63, 2**64, 10**30, 1.0, 1e300, True, None, "4")

_CONFIG_KEYS = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules",
    "base_model_name_or_path", "peft_type", "init_lora_weights", "lora_bias", "bias", "task_type",
    "fan_in_fan_out", "modules_to_save", "target_parameters", "layer_replication",
)  # fmt: skip

_ODD_FLOATS = (0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x00000001, 0x80000000, 0x7FA00001)

_ODD_KEYS = (
    "", ".", "lora_A", "lora_A.weight", ".lora_A.weight", "base_model.model.", "x", "a.lora_B.bias",
    "base_model.model.block.0.q.lora_A.default.weight", "block.0.q.lora_A.weight", "block.0.q.A",
    "base_model.model.block.0.q.lora_magnitude_vector", "x.gram_A", "x.gram_A0", "\ud800", "\n",
    "base_model.model.block.0.q.lora_embedding_A", "\x00", "__metadata__", "a" * 5000, "x.lora_R",
)  # fmt: skip


def _parts(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _write(folder: Path, header: str, data: bytes, length: int | None = None) -> None:
    text = header.encode("utf-8", "surrogatepass")
    size = len(text) if length is None else length
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + text + data)


def _entry(rng: random.Random, header: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    key = rng.choice([key for key in header if key != "__metadata__"])
    return key, header[key]


def flip_bytes(rng: random.Random, folder: Path) -> None:
    file = folder / rng.choice([WEIGHTS, WEIGHTS, WEIGHTS, CONFIG])
    data = bytearray(file.read_bytes())
    last = rng.choice([len(data), len(data), min(len(data), 900), 12])
    for _ in range(rng.choice([1, 1, 1, 2, 8, 64])):
        data[rng.randrange(last)] = rng.randrange(256)
    file.write_bytes(data)


def flip_data(rng: random.Random, folder: Path) -> None:
    header, data = _parts(folder)
    found = bytearray(data)
    for _ in range(rng.choice([1, 4, 32])):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    _write(folder, json.dumps(header), bytes(found))


def odd_payload(rng: random.Random, folder: Path) -> None:
    header, data = _parts(folder)
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 5])):
        place = 4 * rng.randrange(len(found) // 4)
        found[place : place + 4] = struct.pack("<I", rng.choice(_ODD_FLOATS))
    _write(folder, json.dumps(header), bytes(found))


def cut_or_grow(rng: random.Random, folder: Path) -> None:
    file = folder / rng.choice([WEIGHTS, WEIGHTS, CONFIG])
    data = file.read_bytes()
    if rng.random() < 0.7:
        file.write_bytes(data[: rng.randrange(len(data))])
    else:
        file.write_bytes(data + rng.randbytes(rng.randrange(1, 40)))


def header_length(rng: random.Random, folder: Path) -> None:
    header, data = _parts(folder)
    length = rng.choice([0, 1, 7, 2**16, 2**31, 2**40, 2**63, 2**64 - 1, rng.randrange(2000)])
    _write(folder, json.dumps(header), data, length)


def odd_entry(rng: random.Random, folder: Path) -> None:
    header, data = _parts(folder)
    key, entry = _entry(rng, header)
    what = rng.choice(["dtype", "shape", "axis", "offset", "offsets", "entry", "drop", "extra"])
    if what == "dtype":
        entry["dtype"] = rng.choice(_ODD_DTYPES)
    elif what == "shape":
        entry["shape"] = rng.choice(
            [[], [0], [2**62, 4], [0, 2**63], [-3, 12], "12", None, [3, 12, 1], [36], {}, [[3]]]
        )
    elif what == "axis" and entry["shape"]:
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(_ODD_NUMBERS)
    elif what == "offset":
        entry["data_offsets"][rng.randrange(2)] = rng.choice(_ODD_NUMBERS)
    elif what == "offsets":
        entry["data_offsets"] = rng.choice([[], [0], [0, 4, 8], None, "0,4", [8, 0], {}, [[0], 4]])
    elif what == "entry":
        header[key] = rng.choice(_ODD_VALUES)
    elif what == "drop":
        del entry[rng.choice(list(entry))]
    else:
        entry["more"] = 1
    _write(folder, json.dumps(header), data)


def swap_shape(rng: random.Random, folder: Path) -> None:
    """As many numbers in another shape: what only the meaning of the tensors can tell."""
    header, data = _parts(folder)
    _, entry = _entry(rng, header)
    entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]]])
    _write(folder, json.dumps(header), data)


def swap_names(rng: random.Random, folder: Path) -> None:
    header, data = _parts(folder)
    one, _ = _entry(rng, header)
    other, _ = _entry(rng, header)
    header[one], header[other] = header[other], header[one]
    _write(folder, json.dumps(header), data)


def odd_key(rng: random.Random, folder: Path) -> None:
    header, data = _parts(folder)
    key, _ = _entry(rng, header)
    name = rng.choice([*_ODD_KEYS, key.replace("lora_A", "lora_B"), key.replace("q", "k")])
    kept = {name if old == key else old: value for old, value in header.items()}
    _write(folder, json.dumps(kept), data)


def duplicate_key(rng: random.Random, folder: Path) -> None:
    header, data = _parts(folder)
    key, entry = _entry(rng, header)
    copy = f"{json.dumps(key)}: {json.dumps(entry)}"
    _write(folder, json.dumps(header)[:-1] + ", " + copy + "}", data)


def drop_key(rng: random.Random, folder: Path) -> None:
    """Without one tensor, its data gone too: a well-formed file of another adapter."""
    header, data = _parts(folder)
    key, _ = _entry(rng, header)
    begin, end = header.pop(key)["data_offsets"]
    for value in header.values():
        offsets = value.get("data_offsets")
        if offsets and offsets[0] >= end:
            value["data_offsets"] = [offset - (end - begin) for offset in offsets]
    _write(folder, json.dumps(header), data[:begin] + data[end:])


def odd_header(rng: random.Random, folder: Path) -> None:
    _, data = _parts(folder)
    depth = rng.choice([10, 1000, 100_000])
    text = rng.choice(
        [
            "[" * depth,
            '{"a":' * depth,
            "[]",
            "null",
            "1",
            '""',
            "{}",
            "\ufeff{}",
            "{" * 50,
            "\udcff",
        ]
    )
    _write(folder, text, data if rng.random() < 0.5 else b"")


def odd_config(rng: random.Random, folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        key = rng.choice(_CONFIG_KEYS)
        if rng.random() < 0.15:
            config.pop(key, None)
        else:
            config[key] = rng.choice(_ODD_VALUES)
    (folder / CONFIG).write_text(json.dumps(config))


def odd_json(rng: random.Random, folder: Path) -> None:
    depth = rng.choice([10, 200, 900, 100_000])
    text = rng.choice(
        ["", "{", "[]", "null", "NaN", "[" * depth, '{"r":' * depth, "1" * 6000, '{"r": 1e999}',
         '{"x":' + "[" * depth + "]" * depth + "}", '{"r": 3, "r": 4}', "\x00"]
    )  # fmt: skip
    (folder / CONFIG).write_text(text)


def odd_files(rng: random.Random, folder: Path) -> None:
    what = rng.randrange(8)
    file = folder / rng.choice([WEIGHTS, CONFIG])
    if what == 0:
        shutil.rmtree(folder)
        folder.mkdir()
    elif what == 1:
        shutil.rmtree(folder)
    elif what == 2:
        file.unlink()
        file.mkdir()
    elif what == 3:
        file.unlink()
        file.symlink_to(file)
    elif what == 4:
        file.unlink()
        file.symlink_to("/dev/zero")
    elif what == 5:
        file.unlink()
        os.mkfifo(file)
    elif what == 6:
        # What a pickle starts with; running it would end the test.
        (folder / "adapter_model.bin").write_bytes(b"cos\n_exit\n(I3\ntR.")
        (folder / WEIGHTS).unlink()
    else:
        kept = folder.with_name(f"{folder.name}.kept")
        file.rename(kept)
        file.symlink_to(kept)


MUTATIONS: tuple[Callable[[random.Random, Path], None], ...] = (
    flip_bytes, flip_data, odd_payload, cut_or_grow, header_length, odd_entry, swap_shape,
    swap_names, odd_key, duplicate_key, drop_key, odd_header, odd_config, odd_config, odd_json,
    odd_files,
)  # fmt: skip
"""Each damages the folder in place, by the generator alone."""
