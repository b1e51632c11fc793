"""Base weights of 16, 8 or 4 bits by recipe: adapters are fp32, and the base keeps its bits."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedcore.data.base_identity import base_differences
from fedcore.errors import FedcoreError, MissingExtraError
from fedcore.experiments import run as run_module
from fedcore.experiments.observer import Observer
from fedcore.experiments.run import start
from fedcore.experiments.setup import Experiment, build_experiment
from fedcore.experiments.trials import check_sources
from fedcore.recipes import Recipe
from fedcore.training import weight_format
from fedcore.training.evaluation import prediction_loss
from fedcore.training.language_models import load_language_model
from fedcore.training.token_head import TokenHead
from fedcore.training.weight_format import Quantisation, WeightFormat
from tests.experiments.jobs import tiny_causal_recipe, tiny_recipe

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")

BF16 = {"model.dtype": "bf16"}
NF4 = {"model.quantisation": "nf4", "model.compute_dtype": "fp32"}
INT8 = {"model.quantisation": "int8"}
TORCHAO = {"model.quantisation": "torchao-int8"}

FORMATS = [
    pytest.param(BF16, id="bf16"),
    pytest.param(NF4, id="nf4", marks=needs_bitsandbytes),
    pytest.param(INT8, id="int8", marks=needs_bitsandbytes),
    pytest.param(TORCHAO, id="torchao-int8", marks=needs_torchao),
]


def recipe_of(folder: Path, **settings: Any) -> Recipe:
    known = {"clients": 2, "training.steps": 2, "adapter.layers": [-1], "method.name": "fedit"}
    return tiny_causal_recipe(folder, **{**known, **settings})


def frozen_bits(model: nn.Module) -> dict[str, Tensor]:
    """What the base's weights are made of, the scales of quantised ones too."""
    return {
        f"{key} {part}": tensor.clone()
        for key, value in model.named_parameters()
        if not any(word in key for word in ("lora", "gram", "tri"))
        for part, tensor in parts_of(value).items()
    }


def parts_of(value: Tensor) -> dict[str, Tensor]:
    plain = type(value) in (Tensor, nn.Parameter) or not hasattr(value, "__tensor_flatten__")
    if plain:
        return {"": value.detach()}
    names, _ = value.__tensor_flatten__()
    return {name: getattr(value, name).detach() for name in names}


@pytest.mark.parametrize("settings", FORMATS)
@pytest.mark.parametrize("method", ["fedit", "florg", "fed_sb"])
def test_every_family_trains_fp32_factors_on_it(
    tmp_path: Path, settings: Mapping[str, str], method: str
) -> None:
    known: dict[str, Any] = {"method.name": method, "adapter.rank": 2}
    if method == "fed_sb":
        # The other start needs the weights' singular vectors, and is refused for quantised ones.
        known["method.init"] = "random"
    bench = build_experiment(recipe_of(tmp_path, **known, **settings), Observer())
    factors = [p for p in bench.model.parameters() if p.requires_grad]
    assert factors
    assert {p.dtype for p in factors} == {torch.float32}
    batch = torch.arange(4)
    bench.forward.train()
    logits = bench.forward(batch)
    prediction_loss(logits, bench.examples.targets(batch)).backward()
    assert any(bool(p.grad.abs().sum() > 0) for p in factors if p.grad is not None)
    assert isinstance(bench.forward.head, TokenHead), bench.forward.head


@pytest.mark.parametrize("settings", FORMATS)
def test_two_rounds_of_fedex_leave_the_bases_bits_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Mapping[str, str]
) -> None:
    benches: list[tuple[Experiment, dict[str, Tensor]]] = []

    def kept(*arguments: Any, **more: Any) -> Experiment:
        bench = build_experiment(*arguments, **more)
        benches.append((bench, frozen_bits(bench.model)))
        return bench

    monkeypatch.setattr(run_module, "build_experiment", kept)
    records: list[Mapping[str, Any]] = []

    class Seen(Observer):
        def round_finished(self, record: Mapping[str, Any]) -> None:
            records.append(record)

    recipe = recipe_of(tmp_path, **{"method.name": "fedex", "optimiser.rate": 0.05}, **settings)
    start(recipe, tmp_path / "run", Seen())
    assert len(records) == 2
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in records)
    bench, before = benches[0]
    after = frozen_bits(bench.model)
    assert len(before) > 5
    assert all(torch.equal(values, after[key]) for key, values in before.items())
    assert bench.residual._handles, "the update of the base lies beside it"
    if "model.quantisation" in settings:
        assert {torch.uint8, torch.int8} & {values.dtype for values in before.values()}


def test_the_base_identity_tells_formats_apart(tmp_path: Path) -> None:
    plain = build_experiment(recipe_of(tmp_path), Observer()).base
    installed = [NF4, INT8] if find_spec("bitsandbytes") else []
    installed += [TORCHAO] if find_spec("torchao") else []
    for settings in [BF16, *installed]:
        bench = build_experiment(recipe_of(tmp_path, **settings), Observer())
        other = bench.base
        problem, _ = base_differences(other, plain, (), "the server's")
        assert problem is not None
        bench.forward.eval()
        with torch.no_grad():
            bench.forward(torch.arange(2))
        vars(bench).pop("base")
        assert base_differences(bench.base, other, (), "it")[0] is None, "also after a pass"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.compute_dtype": "bf16"}, "model.compute_dtype is 'bf16' and model.quantisation"),
        (
            {"model.quantisation": "int8", "model.compute_dtype": "bf16"},
            "it is for 'nf4': leave it out",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_loading(
    tmp_path: Path, settings: Mapping[str, str], message: str
) -> None:
    with pytest.raises(FedcoreError, match=message):
        check_sources(recipe_of(tmp_path, **settings))


@pytest.mark.parametrize(
    ("quantisation", "library"), [("nf4", "bitsandbytes"), ("torchao-int8", "torchao")]
)
def test_the_libraries_are_an_extra(
    quantisation: Quantisation, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_format, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=rf"{library} is.*fedcore-lora\[quantised\]"):
        WeightFormat(quantisation=quantisation).check()
    WeightFormat("bf16").check()


@pytest.mark.parametrize("settings", [BF16, INT8])
def test_a_classifier_is_fp32(tmp_path: Path, settings: Mapping[str, str]) -> None:
    with pytest.raises(FedcoreError, match="task is 'classification', whose head trains in fp32"):
        tiny_recipe(tmp_path, **settings)


@needs_bitsandbytes
def test_a_gguf_file_is_not_quantised_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedcore.training import language_models

    recipe = recipe_of(tmp_path)
    monkeypatch.setattr(language_models, "gguf_file", lambda _: "model.gguf")
    with pytest.raises(FedcoreError, match=r"is a GGUF file.*; leave out model\.quantisation"):
        load_language_model(recipe.model.source, weights=WeightFormat(quantisation="nf4"))
