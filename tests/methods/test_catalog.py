import json
from dataclasses import dataclass, fields

import pytest

import fedcore.methods.lora
from fedcore.errors import FedcoreError
from fedcore.methods import (
    METHODS,
    Capabilities,
    Description,
    catalog,
    create_method,
    describe_methods,
    find_method,
    register_method,
    registry,
)
from fedcore.methods.registry import default_methods, options_of
from fedcore.methods.shared.linear import LinearMethod

ABOUT = Description(summary="", paper="", exact="no", uplink="0", downlink="0", server_cost="0")

NEW_FILE = '''
from dataclasses import dataclass
from typing import ClassVar

from fedcore.methods.base import Capabilities, Description, Family
from fedcore.methods.lora.fedit import FedIT
from fedcore.methods.shared.linear import LinearMethod


class Half(LinearMethod):
    """Abstract: it says nothing of itself."""


@dataclass(frozen=True)
class Newest(Half):
    name: ClassVar[str] = "aaa"
    family: ClassVar[Family] = "lora"
    capabilities: ClassVar[Capabilities] = FedIT.capabilities
    description: ClassVar[Description] = FedIT.description
'''


@dataclass(frozen=True)
class Foreign(LinearMethod):
    """A method of another package."""

    strict: bool = False

    name = "foreign"
    aliases = ("strange",)
    family = "lora"
    capabilities = Capabilities(linear=True)
    description = ABOUT


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))


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


def test_tables_begin_with_the_plain_mean_and_end_with_the_baselines():
    names = [method.name for method in METHODS]
    assert names == list(catalog._ORDER)
    assert (names[0], names[-1]) == ("fedit", "centralised")


@pytest.mark.parametrize("path", ["newest.py", "newest/method.py"])
def test_a_method_is_found_where_its_file_stands(path, tmp_path, monkeypatch):
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    file.write_text(NEW_FILE)
    if file.parent != tmp_path:
        (file.parent / "__init__.py").touch()
    monkeypatch.setattr(
        fedcore.methods.lora, "__path__", [*fedcore.methods.lora.__path__, str(tmp_path)]
    )
    names = [method.name for method in catalog._shipped()]
    assert names == [*catalog._ORDER, "aaa"]


def test_a_method_of_another_package_is_made_known(own_registry):
    with pytest.raises(FedcoreError, match="unknown method 'foreign'"):
        create_method("foreign")
    assert register_method(Foreign) is Foreign
    register_method(Foreign)
    method = create_method("strange", strict=True)
    assert method == Foreign(strict=True)
    assert create_method(method.name, **options_of(method)) == method
    assert describe_methods()[-1]["name"] == "foreign"
    assert default_methods()[-1] == Foreign()
    assert Foreign not in METHODS


@pytest.mark.parametrize("taken", [{"name": "fedit"}, {"name": "x", "aliases": ("flexlora",)}])
def test_a_name_is_given_once(taken, own_registry):
    clash = type("Clash", (Foreign,), {"aliases": (), **taken})
    with pytest.raises(FedcoreError, match=r"Clash: '(fedit|flexlora)' is the name of"):
        register_method(clash)
    assert clash not in registry.method_classes()


def test_what_code_reads_agrees_with_what_people_read():
    for method in default_methods():
        assert method.capabilities.always_exact == (method.description.exact == "yes")
        assert all(isinstance(v, str) and v for v in vars(method.description).values())


def test_capabilities_are_values_and_descriptions_are_prose():
    assert {field.type for field in fields(Description)} == {"str"}
    assert "str" not in {field.type for field in fields(Capabilities)}
