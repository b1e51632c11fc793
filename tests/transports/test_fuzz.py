"""Damaged messages of one client of three: left out by name, or counted as what they say."""

from __future__ import annotations

import io
import json
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from safetensors.torch import load_file

from fedcore.data.adapter_state import AdapterState
from fedcore.data.exchange import UPLOAD_FILE, UploadFolder, read_broadcast, write_upload
from fedcore.data.rows import row_from_tensors
from fedcore.federation.state import ServerState
from fedcore.transports.flower import FedLoRA, to_arrays
from fedcore.transports.folders import FileServer
from tests.property.bounds import bounded, size_of
from tests.property.method_rounds import random_row
from tests.property.mutations import MUTATIONS
from tests.property.transports import start_adapter
from tests.transports.flower.grid import FakeGrid
from tests.transports.nvflare_stand_in import install

install()

from nvflare.app_common.abstract.fl_model import FLModel  # noqa: E402

from fedcore.data.peft_files import write_adapter  # noqa: E402
from fedcore.transports.nvflare import FedLoRAAggregator  # noqa: E402

CLIENTS = ("node-1", "node-2", "node-3")
BAD = "node-2"
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 2**31, 2**63, 10**40, 0.5, 1e-320, 1e308, float("nan"), float("inf"),
    "", "3", "1e999", "\ud800", "a\nb", "x" * 5000, [], [1], {}, {"a": 1}, [[[[]]]], b"\xff",
)  # fmt: skip


def seeds(few: int, every: int) -> pytest.MarkDecorator:
    """The same numbers again whenever they are drawn: few of them, or the others."""
    rest = pytest.param(range(few, every), marks=pytest.mark.exhaustive)
    return pytest.mark.parametrize("seeds", [range(few), rest], ids=["few", "rest"])


@pytest.fixture(scope="module")
def start() -> AdapterState:
    return start_adapter("lora", torch.float32)


def tensors_of(start: AdapterState, client: int) -> dict[str, torch.Tensor]:
    """What a client sends, by PEFT's keys: a step from the broadcast."""
    layout = start.layout()
    moved = start.to_row(layout) + 0.1 * random_row(layout, 10 + client).float()
    return start.with_row(moved, layout).to_peft()


def wanted(
    start: AdapterState, sent: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]
) -> torch.Tensor:
    """The weighted mean of what was sent, in fp64."""
    layout = start.layout()
    names = {key: name for name, key in start.keys.items()}
    rows = [
        row_from_tensors({names[key]: tensor for key, tensor in one.items()}, layout).double()
        for one in sent
    ]
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return (shares[:, None] * torch.stack(rows)).sum(0)


def check(
    start: AdapterState,
    state: ServerState,
    sent: Mapping[str, Mapping[str, torch.Tensor] | None],
    seen: Counter[str],
    case: object,
) -> None:
    """The round is that of the honest two, of all three as they stand, or it was not taken."""
    record = state.record
    dropped = {drop["client"]: drop["reason"] for drop in record["dropped"]}
    row = state.row.double()
    if not record["clients"]:
        # Refused as a whole, with a flag, for values that nothing explains.
        assert record["flags"], case
        assert torch.equal(row, start.to_row(start.layout()).double()), case
        seen["refused"] += 1
        return
    assert set(dropped) <= {BAD}, case
    for reason in dropped.values():
        assert reason.isprintable(), case
        assert len(reason) < 2000, case
    counted = [client for client in CLIENTS if client not in dropped]
    assert list(record["clients"]) == counted, case
    read = [sent[client] for client in counted]
    weights = [record["clients"][client] for client in counted]
    assert all(tensors is not None for tensors in read), case
    expected = wanted(start, [tensors for tensors in read if tensors is not None], weights)
    error = (row - expected).abs()
    assert bool((error <= 1e-6 * expected.abs() + 1e-6).all()), case
    seen["dropped" if dropped else "counted"] += 1


def enough(seen: Counter[str], seeds: range) -> None:
    """Both ends are reached, so neither half of the promise is empty."""
    assert seen["dropped"] > len(seeds) / 3, seen
    assert seen["counted"] > len(seeds) / 50, seen


# --- folders ------------------------------------------------------------------------------------


def odd_upload(rng: random.Random, folder: Path) -> None:
    file = folder / UPLOAD_FILE
    about = json.loads(file.read_text())
    key = rng.choice(list(about))
    odd = rng.choice([value for value in ODD if not isinstance(value, bytes)])
    if rng.random() < 0.2:
        del about[key]
    elif rng.random() < 0.2:
        about["more"] = odd
    else:
        about[key] = odd
    file.write_text(json.dumps(about))


def torn_upload(rng: random.Random, folder: Path) -> None:
    file = folder / UPLOAD_FILE
    data = bytearray(file.read_bytes())
    if rng.random() < 0.5:
        file.write_bytes(data[: rng.randrange(len(data))])
    else:
        data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data)


FOLDER_MUTATIONS: tuple[Callable[[random.Random, Path], None], ...] = (
    *MUTATIONS,
    odd_upload,
    odd_upload,
    torn_upload,
)


def _stored(folder: Path) -> dict[str, torch.Tensor] | None:
    try:
        return load_file(folder / "adapter_model.safetensors")
    except Exception:
        return None


@seeds(100, 1000)
def test_a_damaged_upload_folder(seeds: range, start: AdapterState, tmp_path: Path) -> None:
    server = FileServer.create(tmp_path / "server", start, "fedit")
    received = read_broadcast(server.broadcast)
    honest = tmp_path / "honest"
    for n, client in enumerate(CLIENTS):
        layout = start.layout()
        row = start.to_row(layout) + 0.1 * random_row(layout, 10 + n).float()
        frozen = received.digest_of(server.method.frozen_layout(received.layout, 0))
        upload = UploadFolder.of(received.announcement, row, float(n + 1), frozen, ())
        write_upload(upload, received.layout, received.adapter, honest / client, factors=True)
    seen: Counter[str] = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        place = tmp_path / "round"
        shutil.copytree(tmp_path / "server", place / "server")
        shutil.copytree(honest, place / "uploads")
        FOLDER_MUTATIONS[seed % len(FOLDER_MUTATIONS)](rng, place / "uploads" / BAD)
        here = FileServer(place / "server", server.method, server.state, server.served)
        folders = {client: place / "uploads" / client for client in CLIENTS}
        with bounded(size_of(*folders.values())), warnings.catch_warnings():
            warnings.simplefilter("error")
            after = here.round(folders, on_invalid="drop")
        counted = after.state.record["clients"]
        sent = {
            client: _stored(folders[client]) if client in counted else None for client in CLIENTS
        }
        check(start, after.state, sent, seen, seed)
        assert FileServer.open(place / "server").state.round == after.state.round
        shutil.rmtree(place)
    enough(seen, seeds)


# --- Flower -------------------------------------------------------------------------------------


def _odd_array(rng: random.Random, array: Array) -> Array:
    fields = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data}
    data = bytearray(array.data)
    what = rng.choice(["bytes", "header", "cut", "grow", "dtype", "shape", "stype", "empty"])
    if what in ("bytes", "header"):
        for _ in range(rng.choice([1, 1, 8])):
            data[rng.randrange(128 if what == "header" else len(data))] = rng.randrange(256)
    elif what == "cut":
        data = data[: rng.randrange(len(data))]
    elif what == "grow":
        data += rng.randbytes(rng.randrange(1, 40))
    elif what == "dtype":
        fields["dtype"] = rng.choice(
            ["float64", "float16", "object", "", "int32", "<U3", "bfloat16"]
        )
    elif what == "shape":
        fields["shape"] = rng.choice([(), (0,), (-1, 3), (2**62, 4), (10**12,), array.shape[::-1]])
    elif what == "stype":
        fields["stype"] = rng.choice(["", "pickle", "torch", "numpy.ndarray\n"])
    else:
        data = bytearray()
    fields["data"] = bytes(data)
    return Array(**fields)


def _mutated(rng: random.Random, content: RecordDict) -> None:
    """Change ``content`` in place, in a way that Flower's own records allow."""
    arrays = content["arrays"]
    key = rng.choice(list(arrays))
    what = rng.choice(["array", "array", "array", "drop", "rename", "metric", "record", "swap"])
    if what == "array":
        arrays[key] = _odd_array(rng, arrays[key])
    elif what == "drop":
        del arrays[key]
    elif what == "rename":
        arrays[rng.choice(["", "x", f"{key}.more", "\n", "a" * 5000])] = arrays.pop(key)
    elif what == "swap":
        other = rng.choice(list(arrays))
        arrays[key], arrays[other] = arrays[other], arrays[key]
    elif what == "metric":
        _put(rng, content, "metrics", rng.choice(["num-examples", "loss", "more"]), MetricRecord)
    else:
        name = rng.choice(["fedcore", "told", "more"])
        field = rng.choice(
            ["client", "flags", "round", "frozen", "kind", "base", "threads", "more"]
        )
        _put(rng, content, name, field, ConfigRecord)


def _put(rng: random.Random, content: RecordDict, name: str, field: str, kind: Any) -> None:
    record = content[name] if name in content else kind()
    for value in rng.sample(ODD, len(ODD)):
        try:
            record[field] = value
        except (TypeError, ValueError, KeyError):
            continue  # Flower itself carries no such value.
        content[name] = record
        return


def _reply(
    start: AdapterState,
    rng: random.Random,
    replies: dict[str, RecordDict],
    message: Message,
    context: Context,
) -> Message:
    """What the node sends, which ``replies`` keeps; that of node 2 is changed."""
    node = context.node_id
    content = RecordDict(
        {
            "arrays": to_arrays(tensors_of(start, node)),
            "metrics": MetricRecord({"num-examples": float(node), "loss": 1.0}),
        }
    )
    if node == 2:
        _mutated(rng, content)
    replies[f"node-{node}"] = content
    return Message(content, reply_to=message)


def _decoded(record: ArrayRecord) -> dict[str, torch.Tensor] | None:
    """Read by NumPy alone."""
    try:
        arrays = {k: np.load(io.BytesIO(a.data), allow_pickle=False) for k, a in record.items()}
        return {key: torch.from_numpy(np.ascontiguousarray(a)) for key, a in arrays.items()}
    except Exception:
        return None


@seeds(100, 1000)
def test_a_damaged_reply(seeds: range, start: AdapterState) -> None:
    seen: Counter[str] = Counter()
    for seed in seeds:
        replies: dict[str, RecordDict] = {}

        strategy = FedLoRA("fedit", fraction_evaluate=0.0, on_invalid="drop")
        size = sum(t.nbytes for t in start.to_peft().values())
        with bounded(6 * size), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            handler = partial(_reply, start, random.Random(seed), replies)
            grid = FakeGrid(dict.fromkeys((1, 2, 3), handler))
            strategy.start(grid, to_arrays(start.to_peft()), num_rounds=1)
        record = strategy.state.record
        sent = {
            client: _decoded(replies[client]["arrays"]) if client in record["clients"] else None
            for client in CLIENTS
        }
        check(start, strategy.state, sent, seen, seed)
    enough(seen, seeds)


# --- NVFlare ------------------------------------------------------------------------------------


def _odd_model(rng: random.Random, model: Any) -> None:
    key = rng.choice(list(model.params))
    value = model.params[key]
    what = rng.choice(
        ["value", "values", "dtype", "shape", "drop", "rename", "round", "meta", "bits"]
    )
    if what == "value":
        model.params[key] = rng.choice(ODD)
    elif what == "values":
        flat = value.reshape(-1).copy()
        flat[rng.randrange(flat.size)] = rng.choice([np.nan, np.inf, -np.inf, 3e38, 1e-40, 0.0])
        model.params[key] = flat.reshape(value.shape)
    elif what == "dtype":
        kind = rng.choice(["float64", "float16", "int32", "bool", "complex64", "U4", "object"])
        model.params[key] = value.astype(kind)
    elif what == "shape":
        model.params[key] = rng.choice([value.T, value.reshape(-1), value[None], value[:0]])
    elif what == "drop":
        del model.params[key]
    elif what == "rename":
        model.params[rng.choice(["", "x", f"{key}.more", "\n", "a" * 5000])] = model.params.pop(key)
    elif what == "round":
        model.current_round = rng.choice(ODD)
    elif what == "meta":
        model.meta[rng.choice([*model.meta, "more"])] = rng.choice(ODD)
    else:
        bits = value.copy()
        raw = bits.view(np.uint32).reshape(-1)
        raw[rng.randrange(raw.size)] ^= np.uint32(1 << rng.randrange(32))
        model.params[key] = bits


@seeds(75, 750)
def test_a_damaged_model(seeds: range, start: AdapterState, tmp_path: Path) -> None:
    folder = write_adapter(start, tmp_path / "start")
    size = sum(t.nbytes for t in start.to_peft().values())
    seen: Counter[str] = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        aggregator = FedLoRAAggregator(str(folder), "fedit", on_invalid="drop")
        params: dict[str, Any] = {}
        for n, client in enumerate(CLIENTS, 1):
            model = FLModel(
                params_type="FULL",
                params={key: tensor.numpy() for key, tensor in tensors_of(start, n).items()},
                current_round=0,
                meta={"client_name": client, "NUM_STEPS_CURRENT_ROUND": float(n)},
            )
            if client == BAD:
                _odd_model(rng, model)
                if model.meta.get("client_name") != BAD:
                    model.meta["client_name"] = BAD
            params[client] = model.params
            with bounded(6 * size):
                aggregator.accept_model(model)
        with bounded(6 * size):
            aggregator.aggregate_model()
        counted = aggregator.state.record["clients"]
        sent = {
            client: {key: torch.as_tensor(value) for key, value in params[client].items()}
            if client in counted
            else None
            for client in CLIENTS
        }
        check(start, aggregator.state, sent, seen, seed)
    enough(seen, seeds)
