from __future__ import annotations

import copy
import importlib
import pickle

import pytest
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

import fedcore.tuners
from fedcore.errors import FedcoreError
from fedcore.tuners import GramConfig, GramModel
from fedcore.tuners.shared.registration import extend_peft_type, register


def test_member_behaves_like_any_other():
    member = PeftType["GRAM"]
    assert member is PeftType.GRAM is PeftType("GRAM")
    assert member == "GRAM"
    assert member.name == member.value == "GRAM"
    assert isinstance(member, PeftType)
    assert list(PeftType).count(member) == 1
    assert member in PeftType
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member
    assert len({PeftType.GRAM, PeftType.LORA}) == 2


def test_registering_again_changes_nothing():
    before = list(PeftType)
    register("gram", GramConfig, GramModel)
    importlib.reload(fedcore.tuners)
    assert extend_peft_type("GRAM") is PeftType.GRAM
    assert list(PeftType) == before
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.GRAM] is GramModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.GRAM] == "gram_"


def test_name_of_somebody_else_is_refused():
    with pytest.raises(FedcoreError, match=r"'lora' is already registered by peft.tuners.lora"):
        register("lora", GramConfig, GramModel)
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is not GramModel
