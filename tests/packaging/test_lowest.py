"""Lower bounds are read as they are meant; that they work is what ``make test-lowest`` tries."""

from __future__ import annotations

import pytest

from tests.packaging.lowest import constraints, lowest_versions

PROJECT = {
    "name": "ours",
    "dependencies": ["torch>=2.6", "numpy >= 1.26"],
    "optional-dependencies": {
        "data": ["safetensors>=0.4.3"],
        "run": ["ours[data]", "peft>=0.18,<0.22", "torch>=2.10", "click<8.5"],
        "pinned": ["Thing[one,two]==1.0.0"],
        "open": ["anything"],
    },
}


def test_the_lower_bound_of_every_requirement_is_pinned_to() -> None:
    assert lowest_versions(PROJECT, []) == {"torch": "2.6", "numpy": "1.26"}
    assert lowest_versions(PROJECT, ["run", "pinned"]) == {
        "torch": "2.10",
        "numpy": "1.26",
        "safetensors": "0.4.3",
        "peft": "0.18",
        "thing": "1.0.0",
    }
    with pytest.raises(ValueError, match="anything has no lower bound"):
        lowest_versions(PROJECT, ["open"])


def test_every_requirement_of_a_user_has_a_lower_bound() -> None:
    lines = constraints(["run", "hub", "flower", "nvflare", "privacy", "causal"]).splitlines()
    assert len(lines) > 15
    assert all(line.count("==") == 1 for line in lines)
