from __future__ import annotations

import pytest
from peft import PeftConfig

from fedcore.errors import FedcoreError
from fedcore.tuners import GramConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"r is 0; pass an integer of 1 or more"),
        ({"r": 2.0}, r"r is 2.0"),
        ({"r": True}, r"r is True"),
        ({"lora_alpha": 0}, r"lora_alpha is 0; pass a finite number above 0"),
        ({"lora_alpha": float("nan")}, r"lora_alpha is nan"),
        ({"rank_pattern": {"query": -1}}, r"rank_pattern\['query'\] is -1"),
        ({"alpha_pattern": {"query": "8"}}, r"alpha_pattern\['query'\] is '8'"),
        ({"frame_seed": -1}, r"frame_seed is -1; pass an integer of 0 or more"),
        ({"init_seed": 0.5}, r"init_seed is 0.5"),
        ({"init_std": 0}, r"init_std is 0; A = 0 is a stationary point"),
        ({"init_std": -0.1}, r"init_std is -0.1"),
        ({"init_std": float("inf")}, r"init_std is inf"),
        ({"frame": "structurd"}, r"unknown frame 'structurd'; did you mean structured\?"),
        ({"bias": "all"}, r"bias is 'all'"),
        ({"layers_pattern": "layer"}, r"layers_pattern is set without layers_to_transform"),
        (
            {"target_modules": "q.*", "layers_to_transform": 1},
            r"target_modules given as one string",
        ),
    ],
)
def test_bad_field_is_named(fields, message):
    with pytest.raises(FedcoreError, match=message):
        GramConfig(**fields)


def test_round_trip_through_its_file(tmp_path):
    config = GramConfig(
        r=4,
        lora_alpha=12,
        target_modules=["query"],
        rank_pattern={"query": 2},
        frame="qr",
        frame_seed=7,
        init_std=0.02,
        offset=False,
    )
    config.save_pretrained(str(tmp_path))
    again = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(again, GramConfig)
    assert again == config
    assert again.peft_type == "GRAM"
