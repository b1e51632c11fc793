"""A rank that no update of a layer can have is refused before factors of it are allocated."""

import pytest
import torch
from torch import nn

from fedcore.errors import FedcoreError
from fedcore.experiments.observer import Observer
from fedcore.experiments.setup import build_experiment
from fedcore.tuners.attach import attach_adapter
from tests.experiments.jobs import tiny_recipe
from tests.tuners.tiny import bert

COMMON = {
    "alpha": 4.0,
    "layers": None,
    "use_rslora": False,
    "init_std": None,
    "frame": "structured",
    "seed": 0,
}


@pytest.mark.parametrize("family", ["lora", "gram", "tri"])
def test_the_layer_and_the_largest_rank_are_named(family):
    model = bert()
    query = next(m for name, m in model.named_modules() if name.endswith("query"))
    most = min(query.weight.shape)
    with pytest.raises(FedcoreError, match=rf"query can have, which is .*; pass {most} at most"):
        attach_adapter(model, family, rank=most + 1, target_modules=["query"], **COMMON)
    attach_adapter(bert(), family, rank=most, target_modules=["query"], **COMMON)


def test_a_rank_of_a_billion_allocates_nothing():
    with pytest.raises(FedcoreError, match="rank 1000000000 is more than an update of"):
        attach_adapter(bert(), "lora", rank=10**9, target_modules=["query"], **COMMON)


def test_a_layer_whose_weights_are_packed_counts_by_its_widths():
    """As a layer of four bits stores them: one column of bytes."""
    model = bert()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            packed = torch.zeros(module.weight.numel() // 2, 1, dtype=torch.uint8)
            module.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(FedcoreError, match=r"rank 1000 is more than an update of .* 24 x 24"):
        attach_adapter(model, "lora", rank=1000, target_modules=["query"], **COMMON)


def test_a_recipe_is_refused_when_it_is_set_up(tmp_path):
    recipe = tiny_recipe(tmp_path, **{"method.name": "fedit", "adapter.rank": 33})
    with pytest.raises(FedcoreError, match=r"rank 33 is more than an update of .*query can"):
        build_experiment(recipe, Observer())
