from __future__ import annotations

import pytest
from peft import PeftConfig

from fedcore.errors import FedcoreError
from fedcore.tuners import TriConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"r is 0; pass an integer of 1 or more"),
        ({"r": True}, r"r is True"),
        ({"lora_alpha": 0}, r"lora_alpha is 0; pass a finite number above 0"),
        ({"lora_alpha": float("inf")}, r"lora_alpha is inf"),
        ({"rank_pattern": {"query": 2.5}}, r"rank_pattern\['query'\] is 2.5"),
        ({"alpha_pattern": {"query": -8}}, r"alpha_pattern\['query'\] is -8"),
        ({"init_seed": -1}, r"init_seed is -1; pass an integer of 0 or more"),
        ({"init": "svd"}, r"unknown init 'svd'"),
        ({"init": None}, r"unknown init 'None'"),
        ({"bias": "all"}, r"bias is 'all'"),
        ({"layers_pattern": "layer"}, r"layers_pattern is set without layers_to_transform"),
        (
            {"target_modules": "q.*", "layers_to_transform": 1},
            r"target_modules given as one string",
        ),
        ({"train_R": "yes"}, r"train_R is 'yes'; pass true or false"),
    ],
)
def test_bad_field_is_named(fields, message):
    with pytest.raises(FedcoreError, match=message):
        TriConfig(**fields)


@pytest.mark.parametrize("init", ["lora", "ce"])
@pytest.mark.parametrize("train_R", [None, True, False])
def test_an_output_basis_of_zero_has_to_train(init, train_R):
    with pytest.raises(FedcoreError, match=r"starts with B = 0 and train_B is false"):
        TriConfig(init=init, train_B=False, train_R=train_R)
    assert TriConfig(init=init, train_A=False, train_R=False).trains == ("B",)


def test_a_core_of_zero_has_to_train():
    with pytest.raises(FedcoreError, match=r"starts with R = 0 and train_R is false"):
        TriConfig(init="random", train_R=False, train_A=True, train_B=True)


@pytest.mark.parametrize("init", ["xs", "sb"])
def test_something_has_to_train(init):
    with pytest.raises(FedcoreError, match=r"train_A, train_R and train_B are all false"):
        TriConfig(init=init, train_A=False, train_R=False, train_B=False)
    assert TriConfig(init=init, train_A=True, train_R=False).trains == ("A",)


@pytest.mark.parametrize(
    ("init", "trains"),
    [("lora", "ARB"), ("ce", "ARB"), ("random", "R"), ("xs", "R"), ("sb", "R")],
)
def test_what_trains_by_default(init, trains):
    assert "".join(TriConfig(init=init).trains) == trains


def test_round_trip_through_its_file(tmp_path):
    config = TriConfig(
        r=4,
        lora_alpha=12,
        target_modules=["query"],
        rank_pattern={"query": 2},
        init="xs",
        init_seed=7,
        train_B=True,
    )
    config.save_pretrained(str(tmp_path))
    again = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(again, TriConfig)
    assert again == config
    assert again.peft_type == "TRI"
