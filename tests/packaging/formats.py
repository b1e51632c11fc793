"""The formats that other processes, files and earlier runs depend on, collected by using them.

Names of modules, functions and locals may change; what is collected here may not: words that seed a
draw, keys of files and messages, names of tensors, columns of JSON, recipe keys, flags. Nothing is
looked up by where it is defined: folders are written, messages sent and commands run, and what they
hold is listed, as sorted lines. ``python -m tests.packaging.formats`` prints all of it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from flwr.app import Array, Message, MetricRecord, RecordDict
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from typer.main import get_command
from typer.testing import CliRunner

# Import paths that a move changes stand between here and ``ROOT`` alone.
from bench.case import Row
from bench.report import to_json
from fedcore.cli import _build as command_line
from fedcore.data.adapter_state import AdapterState
from fedcore.data.base_identity import BaseIdentity
from fedcore.data.codecs import CODECS
from fedcore.data.exchange import BroadcastFolder, UploadFolder, write_broadcast, write_upload
from fedcore.data.low_rank import LowRank
from fedcore.data.peft_files import write_adapter
from fedcore.data.seeding import derive_seed
from fedcore.data.validation import digest
from fedcore.experiments.observer import Observer
from fedcore.experiments.run import start
from fedcore.experiments.run_folder import RunFolder
from fedcore.experiments.setup import build_experiment
from fedcore.merging import aggregate
from fedcore.methods import METHODS, create_method
from fedcore.methods.registry import options_of
from fedcore.methods.shared.factor_pairs import fresh_adapter
from fedcore.privacy import KeyedStream, SecureSum
from fedcore.recipes import Recipe, shipped_recipes, to_toml
from fedcore.training.trainer_client import FederatedClient
from fedcore.transports.flower import FedLoRA, from_arrays, to_arrays
from fedcore.transports.flower.apps import write_app
from fedcore.transports.flower.client import model_tensors
from fedcore.transports.flower.recipe_strategy import RecipeStrategy
from fedcore.transports.flower.secure_aggregation import SecureFedLoRA
from fedcore.transports.flower.strategy import sample_nodes
from fedcore.transports.folders import FileServer
from fedcore.tuners import GramConfig, TriConfig
from fedcore.tuners.gram.frames import FrameRecipe, StructuredFrame
from fedcore_kernels import FactorLayout
from tests.experiments.jobs import tiny_causal_recipe, tiny_recipe
from tests.transports.flower.grid import FakeGrid
from tests.transports.flower.recipe_nodes import recipe_nodes
from tests.transports.nvflare_stand_in import install
from tests.tuners.tiny import bert

install()
from fedcore.transports import nvflare  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fedcore", "kernels/fedcore_kernels", "theory/fedcore_theory")

SEEDERS = frozenset({"derive_seed", "KeyedStream"})
"""What turns words into random numbers; so does every function with a parameter ``purpose``."""

Formats = dict[str, Any]

_KINDS = {bool: "flag", int: "integer", float: "number", str: "text", type(None): "null"}
# What the machine decides and not the format.
_ANY = {"gpu", "git", "git_commit"}
_DATA = (
    (r"client-\d+", "CLIENT"),
    (r"node-\d+", "NODE"),
    (
        r"\b(bert|encoder|model\.layers)\.[\w.]*?\.(query|value|[qv]_proj|o_proj|down_proj)\b",
        "MODULE",
    ),
    (r"round-\d+", "ROUND"),
    (r"\b\d{6,}\b", "NUMBER"),
)


def collect(folder: Path) -> Formats:
    """Every format, in parts; ``folder`` is empty and holds the runs afterwards."""
    with _drawn() as texts:
        runs = _runs(folder / "runs")
        flower = _flower(folder / "flower")
    return {
        "seeds": {
            "words": seed_words(),
            "drawn in tiny runs": sorted({_named(text) for text in texts}),
            "values": _seeds(),
        },
        "random numbers": _random_numbers(),
        "frames": _frames(),
        "codecs": _codecs(),
        "secure sums": _secure_sum(),
        "digests": _digests(),
        "exchange folders": _exchange(folder / "exchange"),
        "run folder": runs,
        "flower": flower,
        "flower secure aggregation": _flower_sums(),
        "flower app": _flower_app(folder),
        "nvflare": _nvflare(folder / "nvflare"),
        "merged folder": _merged(folder / "merged"),
        "tuners": _tuners(folder / "runs"),
        "methods": _methods(),
        "recipe": _recipe_keys(),
        "recipes": sorted(shipped_recipes()),
        "command line": _flags(),
        "command line, JSON": _printed(folder / "printed"),
        "operations": _operations(),
    }


def flat(formats: Any, path: str = "") -> set[str]:
    """Nested formats as lines, ``part > part > what``; the unit in which they are compared."""
    if isinstance(formats, Mapping):
        parts = (flat(value, f"{path}{name} > ") for name, value in formats.items())
        return set().union(*parts)
    if isinstance(formats, list):
        return {f"{path}{item}" for item in formats}
    return {f"{path.removesuffix(' > ')} = {formats}"}


# Seeds and what is drawn from them.


def seed_words() -> list[str]:
    """The literal words of every call that names a random stream, wherever it is made."""
    texts = [
        file.read_text(encoding="utf-8")
        for package in PACKAGES
        for file in sorted((ROOT / package).rglob("*.py"))
    ]
    forwarding = {
        node.name
        for node in _nodes(texts, {"purpose"})
        if isinstance(node, ast.FunctionDef) and "purpose" in _parameters(node)
    }
    words = set()
    for node in _nodes(texts, SEEDERS | forwarding):
        if isinstance(node, ast.Call) and _called(node) in SEEDERS | forwarding:
            literal = [
                argument.value
                for argument in node.args
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            ]
            words.add("/".join(literal))
    return sorted(words - {""})


def _nodes(texts: Iterable[str], words: Iterable[str]) -> Iterator[ast.AST]:
    """The syntax of those ``texts`` that hold one of ``words``."""
    for text in texts:
        if any(word in text for word in words):
            yield from ast.walk(ast.parse(text))


def _parameters(function: ast.FunctionDef) -> set[str]:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return {argument.arg for argument in [*every, arguments.vararg] if argument is not None}


def _called(call: ast.Call) -> str:
    function = call.func
    return getattr(function, "attr", "") or getattr(function, "id", "")


@contextmanager
def _drawn() -> Iterator[set[str]]:
    """The texts that every seed of the block is made of."""
    texts: set[str] = set()

    def recorded(data: bytes = b"") -> Any:
        texts.add(data.decode())
        return hashlib.sha256(data)

    homes = [sys.modules[thing.__module__] for thing in (derive_seed, KeyedStream)]
    for home in homes:
        home.sha256 = recorded  # type: ignore[attr-defined]
    try:
        yield texts
    finally:
        for home in homes:
            home.sha256 = hashlib.sha256  # type: ignore[attr-defined]


def _seeds() -> Formats:
    purposes: tuple[tuple[str | int, ...], ...] = (
        ("batches", 3, "client-1"),
        ("train", 0, "client-00"),
        ("told", "client-00"),
        ("sample", 7),
        ("flora", 2, "layer.0.query"),
        ("",),
    )
    return {
        f"{seed}/{'/'.join(map(str, purpose))}": derive_seed(seed, *purpose)
        for seed in (0, 12345)
        for purpose in purposes
    }


def _random_numbers() -> Formats:
    """Draws that are integers or dyadic fractions on every machine."""
    layout = FactorLayout.build([("q", "A", 2, 3), ("q", "B", 2, 2)])
    fresh = fresh_adapter(torch.zeros(layout.size), layout, 5, "flora", 1)
    drawn = layout.view(fresh, layout.by_name["q.A"]).flatten().tolist()
    stream = KeyedStream(3, "central noise", 1)
    bits = torch.Generator().manual_seed(derive_seed(0, "sample", 2))
    grid = FakeGrid(dict.fromkeys(range(1, 9)))  # type: ignore[arg-type]
    return {
        "keyed stream, uniform": [_hex(stream.uniform((3,))), _hex(stream.uniform((1,)))],
        "order of ten clients": str(torch.randperm(10, generator=bits).tolist()),
        "nodes of a Flower round": str(sample_nodes(grid, 0.5, 2, 2, seed=4)),
        "fresh A": " ".join(f"{number:.4f}" for number in drawn),
    }


def _frames() -> Formats:
    parts: Formats = {}
    for shape in ((6, 4), (3, 7)):
        recipe = FrameRecipe("structured", 3, "encoder.layer.0.query", *shape)
        frame = StructuredFrame(recipe)
        parts[recipe.text] = {
            "frame_id": recipe.frame_id,
            "rows": str(frame.rows.tolist()),
            "signs": str([int(sign) for sign in frame.signs.tolist()]),
            "order": str(frame.order.tolist()),
        }
    return parts


def _sample_row() -> tuple[FactorLayout, Tensor]:
    """A row of a pair of factors, a core and a head, its numbers multiples of 1/8."""
    layout = FactorLayout.build(
        [("q", "A", 2, 5), ("q", "B", 2, 3), ("q", "R", 2, 2)], [("head.weight", (2, 3))]
    )
    row = torch.zeros(layout.size)
    for place, slot in enumerate(layout):
        view = layout.view(row, slot)
        view.copy_((torch.arange(view.numel()) - 4 + place).reshape(view.shape) / 8)
    return layout, row


def _codecs() -> Formats:
    layout, row = _sample_row()
    parts = {}
    for codec in CODECS:
        encoded = codec.encode(row, layout)
        parts[codec.name] = {"tag": encoded.codec, "payload": encoded.payload.hex()}
    return parts


def _secure_sum() -> Formats:
    layout = FactorLayout.build([], [("bias", (2,))])
    total = SecureSum(layout, ["client-00", "client-01", "client-02"], round=4, seed=9)
    masked = {
        client: total.mask(client, torch.full((layout.size,), value), weight)
        for client, value, weight in (
            ("client-00", 0.5, 3),
            ("client-01", -1.25, 1),
            ("client-02", 1e-6, 2),
        )
    }
    parts: Formats = {client: _hex(row[:2]) + _hex(row[-2:]) for client, row in masked.items()}
    for client, row in masked.items():
        total.add(client, row)
    return parts | {"mean": _hex(total.result().row[:2])}


def _digests() -> Formats:
    layout, row = _sample_row()
    return {
        "row": digest(row, layout),
        "row and a constant": digest(row, layout, [torch.arange(3.0)]),
        "layout": [f"{s.name} at {s.offset}: {s.rows} x {s.width}" for s in layout],
    }


# Folders.


def _exchange(folder: Path) -> Formats:
    folder.mkdir()
    adapter = _lora()
    layout = adapter.layout()
    base = BaseIdentity.of("sampled", {"weights": {"w": "0" * 16}})
    rest: dict[str, Any] = {"base": base, "allow": ("template",), "total_rounds": 3}
    broadcast = BroadcastFolder(adapter, 2, "fedex", {"seed": 1}, _residual(adapter), **rest)
    write_broadcast(broadcast, folder / "broadcast")
    said: tuple[Any, ...] = ({"peft_type": "LORA"}, adapter.scaling, base)
    row = adapter.to_row(layout)
    about = UploadFolder(row, 2, 8.0, "f" * 64, "b" * 64, ("a flag",), *said)
    write_upload(about, layout, adapter, folder / "upload of factors", factors=True)
    write_upload(about, layout, adapter, folder / "upload of statistics", factors=False)
    parts = _folder(folder)
    parts["identity of the broadcast"] = broadcast.identity
    parts["client"] = _file_client(folder / "client")
    parts["server"] = _file_server(folder / "server")
    return parts


def _lora() -> AdapterState:
    """One module of rank 2 and a head, by PEFT's keys."""
    module = "base_model.model.encoder.layer.0.query"
    tensors = {
        f"{module}.lora_A.weight": torch.arange(10.0).reshape(2, 5) / 8,
        f"{module}.lora_B.weight": torch.arange(6.0).reshape(3, 2) / 8,
        "base_model.model.head.weight": torch.ones(2, 3),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"]}
    return AdapterState.from_peft(tensors, config)


def _residual(adapter: AdapterState) -> dict[str, LowRank]:
    return {module: LowRank(torch.ones(1, 3), torch.ones(1, 5)) for module in adapter.factors}


def _client(folder: Path | None = None, **options: Any) -> FederatedClient:
    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["query"], task_type="SEQ_CLS")
    model = get_peft_model(bert(), config)
    return FederatedClient(model, examples=8, private=folder, **options)


def _file_client(folder: Path) -> Formats:
    client = _client(folder, method="fedsa", round=0)
    client.receive(client.outline)
    client.prepare()
    (folder.parent / "checkpoint-1").mkdir()
    state = SimpleNamespace(output_dir=folder.parent, global_step=1)
    client.on_save(state, state, None)
    return {"private": _folder(folder), "checkpoint": _folder(folder.parent / "checkpoint-1")}


def _file_server(folder: Path) -> Formats:
    client = _client()
    server = FileServer.create(folder, client.outline, "fedit")
    client.receive(server.broadcast)
    client.upload(folder / "uploads" / "site-1")
    after = server.round(folder / "uploads")
    return {
        "folders": _files(folder, directories=True),
        "record": leaves(after.state.record | {"dropped": [_DROPPED], "flags": ["a flag"]}),
    }


_DROPPED = {"client": "site-2", "reason": "it did not report"}


def _merged(folder: Path) -> Formats:
    adapter = _lora()
    layout = adapter.layout()
    for name, scale in (("one", 1.0), ("two", 0.5)):
        scaled = adapter.with_row(adapter.to_row(layout) * scale, layout)
        write_adapter(scaled, folder / name)
    out = folder / "out"
    aggregate([folder / "one", folder / "two"], method="fedex", out=out, compare=False)
    return _folder(out)


# Runs of the tiny job.


def _runs(folder: Path) -> Formats:
    """What runs of different kinds leave in their folders, put together."""
    home = folder / "home"
    home.mkdir(parents=True)
    common: dict[str, Any] = {
        "clients": 3,
        "rounds": 1,
        "training.steps": 1,
        # No draw of the partition is rejected.
        "partition.alpha": 1000.0,
    }
    ranks = {"adapter.rank": 2, "adapter.client_ranks": [2, 1, 1]}
    seeded = {"privacy.noise": "seeded", "privacy.delta": 1e-3}
    private = {**seeded, "privacy.noise_multiplier": 1.0, "optimiser.state": "keep"}
    central = {
        **seeded,
        "privacy.central.noise_multiplier": 1.0,
        "round.weighting": "uniform",
        "round.participation": 0.9,
    }
    jobs: dict[str, dict[str, Any]] = {
        "gram": {"method.name": "florg", "round.participation": 0.7, "round.dropout": 0.4},
        "tri": {"method.name": "fed_sb", "round.secure_sum": True, "partition.kind": "iid"},
        "personal": {"method.name": "fedsa", **private},
        "ranks": {"method.name": "flora", **ranks, "evaluation.target_accuracy": 0.01},
        "head": {"method.name": "head_only", **central, "partition.kind": "by_label"},
    }
    recipes = {name: tiny_recipe(home, **{**common, **job}) for name, job in jobs.items()}
    causal = {"method.name": "fedit", **common}
    recipes["text"] = tiny_causal_recipe(home, **causal)
    parts: dict[str, set[str]] = {}
    for name, recipe in recipes.items():
        start(recipe, folder / name)
        for file, lines in _folder(folder / name).items():
            # A state repeats the record of its round; configurations are the tuners' part.
            if "adapter_config" not in file:
                fresh = (line for line in lines if not line.startswith("record."))
                parts.setdefault(file, set()).update(fresh)
    return {file: sorted(lines) for file, lines in sorted(parts.items())}


def _tuners(runs: Path) -> Formats:
    """Our own fields of the configurations that runs have written, and what exports say."""
    parts: Formats = {}
    common = {field.name for field in fields(PeftConfig)}
    for config, folder in ((GramConfig, "gram"), (TriConfig, "tri")):
        written = _json(runs / folder / "adapter" / "adapter_config.json")
        names = {field.name for field in fields(config)} - common
        assert names <= written.keys()
        ours = {name: value for name, value in written.items() if name in names}
        parts[config.__name__] = [f"peft_type = {written['peft_type']}", *leaves(ours)]
    exported = _json(runs / "gram" / "adapter-lora" / "adapter_config.json")
    parts["plain LoRA"] = [f"peft_type = {exported['peft_type']}", *leaves(exported)]
    return parts


# Flower and NVFlare.


def _flower(folder: Path) -> Formats:
    """Messages of recipes whose clients use every record there is."""
    home = folder / "home"
    home.mkdir(parents=True)
    common: dict[str, Any] = {
        "clients": 3,
        "rounds": 2,
        "training.steps": 1,
        "partition.alpha": 1000.0,
    }
    ranks = {"adapter.rank": 2, "adapter.client_ranks": [2, 1, 1]}
    mixtures = {"method.min_per_component": 4, "method.share_counts": True}
    jobs: dict[str, dict[str, Any]] = {
        # A core gets no gradient before B has moved.
        "mixtures": {"method.name": "ce_lora", "training.steps": 2, **mixtures},
        "residual": {"method.name": "flora", **ranks, "round.dropout": 0.5, "round.codec": "bf16"},
        "statistics": {"method.name": "florg.whitened", **ranks},
    }
    parts: dict[str, set[str]] = {}

    def add(part: str, lines: Iterable[str]) -> None:
        parts.setdefault(part, set()).update(lines)

    for name, job in jobs.items():
        recipe = tiny_recipe(home, **{**common, **job})
        bench = build_experiment(recipe, Observer())
        grid, replies = _listened(FakeGrid(recipe_nodes(bench)))
        run = RunFolder.create(folder / name, recipe)
        strategy = RecipeStrategy(bench, run)
        strategy.start(grid, to_arrays(model_tensors(bench)), 2, checkpoint_dir=run.states)
        for message in grid.sent:
            add(f"{message.metadata.message_type} message", _content(message.content))
        for reply in replies:
            kind = f"{reply.metadata.message_type} reply"
            if reply.has_error():
                add(kind, [f"error {reply.error.code}"])
            else:
                add(kind, _content(reply.content))
        for context in grid.contexts.values():
            # A client that dropped out of every round keeps nothing.
            if len(context.state):
                add("client's context", _content(context.state))
        for file, lines in _folder(run.path).items():
            add(f"run folder, {file}", (line for line in lines if not line.startswith("record.")))
    messages: Formats = {part: sorted(lines) for part, lines in sorted(parts.items())}
    return messages | {"record of an app's own": leaves(_own_app())}


def _listened(grid: FakeGrid) -> tuple[FakeGrid, list[Message]]:
    """``grid``, and the replies that will have come from its nodes."""
    replies: list[Message] = []

    def listening(handler: Any) -> Any:
        def handle(message: Message, context: Any) -> Message:
            replies.append(handler(message, context))
            return replies[-1]

        return handle

    grid.handlers = {node: listening(handler) for node, handler in grid.handlers.items()}
    return grid, replies


def _own_app() -> dict[str, Any]:
    """The record of a round of clients that know nothing of fedcore, one of which fails."""

    def reply(message: Message, context: Any) -> Message:
        tensors = from_arrays(message.content["arrays"])
        metrics = MetricRecord({"num-examples": 1.0})
        content = {"arrays": to_arrays(tensors), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    def broken(message: Message, context: Any) -> Message:
        raise RuntimeError("power cut")

    strategy = FedLoRA("fedit", fraction_evaluate=0.0)
    grid = FakeGrid({1: reply, 2: reply, 3: broken})
    strategy.start(grid, to_arrays(_lora().to_peft()), num_rounds=1)
    return dict(strategy.state.record) | {"flags": ["a flag"]}


def _content(content: RecordDict) -> list[str]:
    """Records, their kinds, keys and types of values."""
    lines = []
    for name, record in content.items():
        kind = type(record).__name__
        lines += [_named(f"{name}, {kind}: {key}{_kind(v)}") for key, v in record.items()]
    return lines or ["empty"]


def _kind(value: Any) -> str:
    return f" {value.dtype}" if isinstance(value, Array) else f" {_KINDS[type(value)]}"


def _flower_sums() -> Formats:
    strategy = SecureFedLoRA("ffa", _lora().to_peft(), fraction_evaluate=0.0)
    assert strategy.on_fit_config_fn is not None
    config = strategy.on_fit_config_fn(1)
    sent = [t.numpy() for k, t in _lora().to_peft().items() if "lora_A" not in k]
    result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(sent), 10, {})
    strategy.aggregate_fit(1, [(None, result)] * 2, [])  # type: ignore[list-item]
    return {
        "configuration": [f"{key} = {value!r}" for key, value in config.items()],
        "record": leaves(dict(strategy.state.record) | {"flags": ["a flag"]}),
    }


def _flower_app(folder: Path) -> Formats:
    recipe = tiny_recipe(folder / "flower" / "home", **{"method.name": "fedit"})
    app = write_app(recipe, folder / "app", out=folder / "out")
    about = tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))
    job = about["tool"]["flwr"]["app"]
    return {
        "files": _files(app),
        "pyproject.toml": leaves(about),
        "components": [f"{name} = {value}" for name, value in job["components"].items()],
    }


def _nvflare(folder: Path) -> Formats:
    adapter = folder / "adapter"
    write_adapter(_lora(), adapter)
    aggregator = nvflare.FedLoRAAggregator(str(adapter), "fedit", on_invalid="drop")
    persistor = nvflare.AdapterPersistor(str(adapter), str(folder / "out"))
    model_class = sys.modules["nvflare.app_common.abstract.fl_model"].FLModel
    for name in ("site-1", "site-2"):
        bad = {"meta": {"client_name": name}}
        good = {"meta": {"client_name": name, nvflare.NUM_STEPS: 3.0}}
        params = {key: tensor.numpy() for key, tensor in _lora().to_peft().items()}
        about = good if name == "site-1" else bad
        aggregator.accept_model(model_class(params=params, current_round=0, **about))
    result = aggregator.aggregate_model()
    client = _client(method="fedit", round=0)
    client.receive(client.outline)
    sent = nvflare.reply(client)
    return {
        "arguments of the aggregator": list(signature(type(aggregator)).parameters),
        "attributes of the aggregator": [n for n in vars(aggregator) if not n.startswith("_")],
        "arguments of the persistor": list(signature(type(persistor)).parameters),
        "model for the clients": [f"{k} {v.dtype}" for k, v in result.params.items()],
        "model, kind": str(result.params_type.value),
        "loaded model": list(persistor.load_model(None)),
        "upload": sorted({_named(key) for key in sent.params}),
        "upload's meta": leaves(sent.meta),
        "record": leaves(dict(aggregator.state.record) | {"flags": ["a flag"]}),
    }


# What people write and read.


def _methods() -> Formats:
    parts: Formats = {}
    for method in METHODS:
        created = create_method(method.name)
        options = [f"option {name} = {value!r}" for name, value in options_of(created).items()]
        aliases = [f"alias {alias}" for alias in method.aliases]
        parts[method.name] = [f"adapter {method.family}", *aliases, *options]
    return parts


def _recipe_keys() -> list[str]:
    """Recipe keys with types, bounds, enumerations and defaults."""
    schema = Recipe.model_json_schema()
    definitions = schema.pop("$defs")

    def lines(table: Mapping[str, Any], prefix: str) -> Iterator[str]:
        yield f"{prefix or 'recipe.'}*: unknown keys {table.get('additionalProperties', True)}"
        for name, facts in table["properties"].items():
            if "$ref" in facts:
                inner = definitions[facts["$ref"].rpartition("/")[2]]
                yield from lines(inner, f"{prefix}{name}.")
                continue
            plain = {k: v for k, v in facts.items() if k not in ("title", "description")}
            text = json.dumps(plain, sort_keys=True).replace('"', "")
            yield f"{prefix}{name}: {text}"

    return sorted(lines(schema, ""))


def _flags() -> Formats:
    parts: Formats = {}

    def walk(command: Any, name: str) -> None:
        for parameter in command.params:
            names = [*parameter.opts, *parameter.secondary_opts]
            parts.setdefault(name, []).append(" ".join(names))
        for inner, subcommand in getattr(command, "commands", {}).items():
            parts.setdefault(f"{name} {inner}", [])
            walk(subcommand, f"{name} {inner}")

    walk(get_command(command_line()), "fedcore")
    return {name: flags for name, flags in sorted(parts.items()) if flags}


def _printed(folder: Path) -> Formats:
    """What commands print as JSON."""
    folder.mkdir()
    home = folder / "home"
    home.mkdir()
    recipe = tiny_recipe(home, clients=2, rounds=1, **{"training.steps": 1})
    file = folder / "tiny.toml"
    file.write_text(to_toml(recipe), encoding="utf-8")
    out = folder / "compared"
    attack = ("--uploads", "lora", "--seeds", "1", "--steps", "1", "--refinements", "0")
    commands: dict[str, tuple[str, ...]] = {
        "methods": (),
        "recipes": (),
        "theory": ("--check", "R1", "--seeds", "2", "--processes", "1"),
        "audit": (*attack, "--batch", "1", "--starts", "1", "--warm-up", "0"),
        "compare": (str(file), "--methods", "fedit", "--seeds", "1", "--out", str(out)),
    }
    runner, app = CliRunner(), command_line()
    parts: Formats = {}
    for name, options in commands.items():
        done = runner.invoke(app, [name, "--json", *options])
        assert done.exit_code == 0, (name, done.output, done.exception)
        parts[name] = leaves(json.loads(done.stdout))
    parts["compare, files"] = [n for n in _files(out) if "/" not in n]
    values: dict[str, Any] = {"int": 1, "float": 1.0, "str": "", "int | None": 1}
    row = Row(**{field.name: values[str(field.type)] for field in fields(Row)})
    parts["bench"] = leaves(json.loads(to_json([row])))
    return parts


def _operations() -> list[str]:
    """The operations that torch knows, with the names of their arguments."""
    return sorted(
        f"{schema.name}({', '.join(argument.name for argument in schema.arguments)})"
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("fedcore::")
    )


# Values as lines.


def leaves(value: Any, path: str = "") -> list[str]:
    """``key.key[].key: type`` for everything that a JSON value holds, without repetitions."""
    return sorted(set(_leaves(value, path)))


def _leaves(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            name = _named(str(key))
            if name in _ANY:
                yield f"{path}{name}: any"
            else:
                yield from _leaves(inner, f"{path}{name}.")
    elif isinstance(value, list) and value:
        for inner in value:
            yield from _leaves(inner, f"{path.removesuffix('.')}[].")
    else:
        kinds = {dict: "empty", list: "empty list"}
        yield f"{path.removesuffix('.')}: {kinds.get(type(value)) or _KINDS[type(value)]}"


def _named(text: str) -> str:
    """``text`` with what depends on the tiny job replaced by what it is."""
    for pattern, name in _DATA:
        text = re.sub(pattern, name, text)
    return text


def _hex(values: Tensor) -> str:
    array = values.numpy()
    return array.astype(array.dtype.newbyteorder("<")).tobytes().hex()


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _files(folder: Path, *, directories: bool = False) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_dir() == directories)
    return sorted({_named(str(path.relative_to(folder))) for path in paths})


def _folder(folder: Path) -> Formats:
    """Every file, with the keys of JSON and the names and dtypes of tensors."""
    parts: dict[str, set[str]] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = _named(str(file.relative_to(folder)))
        lines = parts.setdefault(name, set())
        if file.suffix == ".safetensors":
            lines |= {_named(f"{key}: {t.dtype}") for key, t in load_file(file).items()}
        elif file.suffix == ".jsonl":
            for text in file.read_text(encoding="utf-8").splitlines():
                lines |= set(leaves(json.loads(text)))
        elif file.suffix == ".json":
            lines |= set(leaves(_json(file)))
        else:
            lines.add("text")
    return {name: sorted(lines) for name, lines in parts.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(collect(Path(scratch)), indent=1, ensure_ascii=False))
