from __future__ import annotations

import pytest

from fedcore.errors import FedcoreError
from fedcore.methods import create_method
from fedcore.methods.registry import default_methods
from fedcore.methods.requirements import (
    MIXED_RANKS,
    NOISY_MEAN,
    ONE_BROADCAST,
    SECURE_SUM,
    meets,
    methods_meeting,
    of_family,
    refuse,
)

PLACES = [ONE_BROADCAST, SECURE_SUM, NOISY_MEAN, (MIXED_RANKS, of_family("lora"))]


@pytest.mark.parametrize("needs", PLACES)
def test_a_refusal_names_exactly_the_methods_that_are_not_refused(needs):
    allowed, named = [], set()
    for method in default_methods():
        try:
            refuse(method, needs, "here")
        except FedcoreError as error:
            named.add(str(error).split("; use one of ")[1])
        else:
            allowed.append(method.name)
    assert named == {", ".join(allowed)}
    assert allowed == [method.name for method in methods_meeting(needs)]


def test_the_message_says_where_what_and_what_instead():
    with pytest.raises(FedcoreError) as caught:
        refuse(create_method("fedex"), (MIXED_RANKS, of_family("lora")), "ranks [1, 2]", "do not")
    assert str(caught.value).startswith("ranks [1, 2]: fedex needs equal ranks; use one of ffa, ")
    assert str(caught.value).endswith(", or do not")


def test_the_options_of_a_method_decide_and_its_host_is_named():
    needs = (MIXED_RANKS, of_family("lora"))
    assert meets(create_method("robust_clip"), needs)
    with pytest.raises(FedcoreError, match="here: robust_clip with host fedit needs equal ranks"):
        refuse(create_method("robust_clip", host="fedit"), needs, "here")


def test_where_no_method_can_run_the_message_says_so():
    with pytest.raises(FedcoreError, match=r"here: fedit is not for .* 'none'; no method can be"):
        refuse(create_method("fedit"), (of_family("none"), MIXED_RANKS), "here")
    with pytest.raises(FedcoreError, match=r"'none'; pass equal ones$"):
        refuse(create_method("fedit"), (of_family("none"), MIXED_RANKS), "here", "pass equal ones")
