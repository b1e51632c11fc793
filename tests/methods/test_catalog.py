import json

import pytest

from fedcore.errors import FedcoreError
from fedcore.methods import METHODS, create_method, describe_methods, find_method


def test_every_name_and_alias_finds_its_method():
    names = [name for method in METHODS for name in (method.name, *method.aliases)]
    assert len(names) == len(set(names))
    for method in METHODS:
        for name in (method.name, *method.aliases):
            assert find_method(name) is method
            assert create_method(name).name == method.name
    assert find_method("florg").name == "florg.truncated"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flogr", {}, "unknown method 'flogr'; did you mean .*florg"),
        ("fedit", {"align": True}, "unknown option of method fedit 'align'"),
        ("florg", {"algn": True}, "did you mean align"),
        ("florg", {"align": "yes"}, "align is 'yes'; pass true or false"),
    ],
)
def test_mistakes_get_one_line_with_the_nearest_names(name, options, message):
    with pytest.raises(FedcoreError, match=message) as caught:
        create_method(name, **options)
    assert "\n" not in str(caught.value)


def test_the_listing_is_flat_json():
    rows = json.loads(json.dumps(describe_methods()))
    assert [row["name"] for row in rows] == [method.name for method in METHODS]
    for row in rows:
        assert all(isinstance(value, str | bool) for value in row.values())
